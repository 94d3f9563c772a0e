"""Which sample is at which position of which batch: a function of (seed, step, position in the global batch).

Nothing here has a state to save. A run that is resumed, or distributed over another number of processes, trains on the
same samples in each step.

    B  micro-batch size on one process        G  global batch size = B × processes × accumulation
    N  rows of the dataset                    K  groups of rows (classes, or aspect buckets)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from training.core.blocks import RowBlocks
from training.core.draws import SampleKey, mix
from training.core.layout import BatchLayout


@dataclass(frozen=True)
class Strata:
    """Groups of rows (classes), and the share that each group should have of the drawn samples.

    group_of_row: N, int64, from 0 to K - 1, no group empty. shares: K, float64, above 0, summing to 1.
    """

    group_of_row: Tensor
    shares: Tensor


class StratifiedDraw:
    """Epochs of `size` weighted draws; each epoch is a function of (seed, epoch) alone.

    The number of draws of each group and of each row varies as little as integers allow:

    - Groups: systematic resampling (Kitagawa 1996). The expected counts size · share form adjacent intervals on a line,
      and the points k + u, k = 0 to size - 1, select a group each; u is uniform in [0, 1) and drawn once per epoch. The
      count of a group is its expected count rounded down or up, and equals the expected count on average.
    - Rows: the rows of a group take turns. The draws of a group, counted over all epochs, follow a sequence of seeded
      permutations of its rows. At any time, the numbers of draws of two rows of a group differ by at most 1.

    Finally, a seeded permutation of the epoch mixes the groups.

    With independent draws the count of a group would have a standard deviation of about its square root, and a third
    of the rows that are drawn once on average would be left out of an epoch. The chi-square statistic of the shares is
    therefore smaller than for independent draws, close to 0 for any seed; it is still large when the shares are wrong.
    """

    def __init__(self, strata: Strata, size: int, seed: int):
        self.size, self.seed = size, seed
        self._rows = [(strata.group_of_row == group).nonzero().flatten() for group in range(len(strata.shares))]
        # Boundaries of the groups' intervals. The last one is set to `size`, since the sum is rounded.
        edges = size * strata.shares.cumsum(0)
        self._edges = torch.cat([edges.new_zeros(1), edges[:-1], edges.new_tensor([size])])
        self._counted = 0
        self._drawn_before = torch.zeros(len(self._rows), dtype=torch.int64)

    def counts(self, epoch: int) -> Tensor:
        """Return the number of draws of each group in an epoch. K, int64."""
        offset = mix(self.seed, "groups", epoch) / 2**63  # u: uniform in [0, 1)
        return torch.ceil(self._edges - offset).diff().long()

    def order(self, epoch: int) -> Tensor:
        """Return the rows of an epoch in the order of training. size, int64."""
        starts, counts = self._counts_before(epoch).tolist(), self.counts(epoch).tolist()
        drawn = torch.cat([self._turns(group, *span) for group, span in enumerate(zip(starts, counts, strict=True))])
        return drawn[_permutation(self.size, self.seed, "order", epoch)]

    def _counts_before(self, epoch: int) -> Tensor:
        """Return the number of draws of each group in all earlier epochs. K, int64.

        The sum is kept for the next call, as training asks for one epoch after another.
        """
        if epoch < self._counted:
            self._counted, self._drawn_before = 0, torch.zeros_like(self._drawn_before)
        while self._counted < epoch:
            self._drawn_before = self._drawn_before + self.counts(self._counted)
            self._counted += 1
        return self._drawn_before

    def _turns(self, group: int, start: int, count: int) -> Tensor:
        """Return `count` rows of a group, beginning with draw number `start` (from 0, over all epochs) of the group."""
        return _in_turn(self._rows[group], start, count, self.seed, "turn", group)


class GroupedBatches:
    """Epochs in which each global batch has rows of one group; each epoch is a function of (seed, epoch) alone.

    Every row is in every epoch. The last batch of a group is filled with further rows of this group, which take turns
    from epoch to epoch: after any number of epochs, the numbers of draws of two rows of a group differ by at most 1. A
    seeded permutation of the batches mixes the groups.

    Args:
        groups: N, int64, the group of each row.
    """

    def __init__(self, groups: Tensor, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        self._rows = [(groups == group).nonzero().flatten() for group in groups.unique().tolist()]
        self.steps_per_epoch = sum(-(-len(rows) // batch_size) for rows in self._rows)

    def order(self, epoch: int) -> Tensor:
        """Return the rows of an epoch in the order of training. steps_per_epoch · G, int64."""
        batches = torch.cat([self._drawn(group, epoch) for group in range(len(self._rows))]).view(-1, self.batch_size)
        return batches[_permutation(len(batches), self.seed, "batches", epoch)].flatten()

    def _drawn(self, group: int, epoch: int) -> Tensor:
        """Return all rows of a group in the order of the epoch, and those that fill its last batch."""
        rows = self._rows[group]
        missing = -len(rows) % self.batch_size
        fill = _in_turn(rows, epoch * missing, missing, self.seed, "fill", group)
        return torch.cat([rows[_permutation(len(rows), self.seed, "order", epoch, group)], fill])


class WindowedOrder:
    """Epochs that read blocks of rows nearly in turn; each epoch is a function of (seed, epoch) alone.

    The blocks are permuted and divided into windows of about `blocks.window` rows, and the rows of a window are
    permuted. Every row is in every epoch. The row numbers of one window are in memory at a time.
    """

    def __init__(self, blocks: RowBlocks, seed: int):
        self.blocks, self.seed = blocks, seed
        self._epoch, self._window = -1, -1

    def rows(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the rows at the positions `start <= position < stop` of an epoch."""
        if epoch != self._epoch:
            self._begin(epoch)
        found: list[int] = []
        while start + len(found) < stop:
            place = start + len(found)
            window = int(torch.searchsorted(self._stops, place, right=True))
            if window != self._window:
                self._window, self._rows = window, self._rows_of(window)
            first = int(self._stops[window]) - len(self._rows)
            found += self._rows[place - first : stop - first].tolist()
        return found

    def _begin(self, epoch: int) -> None:
        sizes = self.blocks.starts.diff()
        self._epoch, self._window = epoch, -1
        self._order = _permutation(len(sizes), self.seed, "blocks", epoch)
        stops = sizes[self._order].cumsum(0)
        windows = (stops - sizes[self._order]) // self.blocks.window
        _, counts = windows.unique_consecutive(return_counts=True)
        self._blocks_before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self._stops = stops[self._blocks_before[1:] - 1]

    def _rows_of(self, window: int) -> Tensor:
        blocks = self._order[self._blocks_before[window] : self._blocks_before[window + 1]]
        starts = self.blocks.starts
        rows = torch.cat([torch.arange(int(starts[block]), int(starts[block + 1])) for block in blocks.tolist()])
        return rows[_permutation(len(rows), self.seed, "window", self._epoch, window)]


class StepSampler(Sampler[list[SampleKey]]):
    """Yields the keys of each micro-batch of this process, for the steps `start_step <= step < stop_step`.

    An epoch is a seeded permutation of the dataset, of `num_samples // G` steps; the remainder is dropped. With
    `strata` an epoch has the same number of steps, and `StratifiedDraw` draws exactly the rows for these steps. With
    `groups` (N, int64) the rows of a global batch are of one group, and an epoch is one of `GroupedBatches`. With
    `blocks` alone, an epoch is one of `WindowedOrder`.
    """

    def __init__(
        self,
        num_samples: int,
        layout: BatchLayout,
        seed: int,
        start_step: int = 0,
        stop_step: int = 0,
        strata: Strata | None = None,
        groups: Tensor | None = None,
        blocks: RowBlocks | None = None,
    ):
        self.num_samples = num_samples
        self.layout = layout
        self.seed = seed
        self.start_step = start_step
        self.stop_step = stop_step
        self.steps_per_epoch = num_samples // layout.global_batch_size
        size = self.steps_per_epoch * layout.global_batch_size
        self._draw: StratifiedDraw | GroupedBatches | None = None
        if groups is not None:
            self._draw = GroupedBatches(groups, layout.global_batch_size, seed)
            self.steps_per_epoch = self._draw.steps_per_epoch
        elif strata is not None:
            self._draw = StratifiedDraw(strata, size, seed)
        self._windows = WindowedOrder(blocks, seed) if blocks is not None and self._draw is None else None
        self._epoch = -1
        # A tensor: a list of a million numbers would take five times the memory.
        self._order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self.layout.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for step in range(self.start_step, self.stop_step):
            for micro_batch in range(self.layout.gradient_accumulation_steps):
                yield self.keys(step, micro_batch)

    def keys(self, step: int, micro_batch: int) -> list[SampleKey]:
        """Return the keys of this process's batch number `micro_batch` in `step` (both from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first, positions = step_in_epoch * self.layout.global_batch_size, self.layout.positions(micro_batch)
        rows = self._rows_at(epoch, first + positions.start, first + positions.stop)
        return [
            SampleKey(row, mix(self.seed, "sample", step, position))
            for row, position in zip(rows, positions, strict=True)
        ]

    def _rows_at(self, epoch: int, start: int, stop: int) -> list[int]:
        if self._windows is not None:
            return self._windows.rows(epoch, start, stop)
        if epoch != self._epoch:
            self._order = self._rows_of(epoch)
            self._epoch = epoch
        return self._order[start:stop].tolist()

    def _rows_of(self, epoch: int) -> Tensor:
        if self._draw is not None:
            return self._draw.order(epoch)
        return _permutation(self.num_samples, self.seed, "order", epoch)


def _in_turn(rows: Tensor, start: int, count: int, *seed: int | str) -> Tensor:
    """Return entries `start` to `start + count - 1` of an endless sequence of seeded permutations of `rows`."""
    first, stop = start // len(rows), -(-(start + count) // len(rows))
    turns = [rows[_permutation(len(rows), *seed, turn)] for turn in range(first, stop)]
    return torch.cat([rows[:0], *turns])[start - first * len(rows) :][:count]


def _permutation(size: int, *seed: int | str) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(mix(*seed)))
