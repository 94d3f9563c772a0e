"""Which sample sits where, and every random number: functions of (seed, step, position in the global batch).

Nothing here has a state to save. A run that is resumed, or spread over other processes, asks the same questions and
gets the same answers.

    B  micro-batch size on one process        G  global batch size = B × processes × accumulation
    N  rows of the dataset                    K  groups of rows (classes)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from training.core.draws import SampleKey, mix
from training.core.layout import BatchLayout


@dataclass(frozen=True)
class Strata:
    """Rows in groups (classes) that are to have given shares of what is drawn.

    group_of_row: N, int64, from 0 to K - 1, no group empty. shares: K, float64, above 0, summing to 1.
    """

    group_of_row: Tensor
    shares: Tensor


class StratifiedDraw:
    """Epochs of `size` weighted draws with replacement; each is a function of (seed, epoch) alone.

    It varies as little as whole rows allow, at two levels. Groups: systematic resampling (Kitagawa 1996) lays the
    points k + u, k = 0 to size - 1, on the expected counts size · share put end to end, with u uniform in [0, 1) drawn
    for the epoch: a group gets the whole number below its expected count or the one above, and the expected count on
    average. Rows: the members of a group take turns. Its draws of all epochs, one after another, are read off seeded
    permutations of its rows, so that at any time no row was drawn more than once more often than another of its group.
    Then a seeded permutation of the epoch mixes the groups.

    Independent draws would scatter a group's count by the root of it, and of a large group whose rows are drawn once on
    average would leave out every third. A chi-square test of the shares therefore finds less scatter than that of
    independent draws, close to 0, whatever the seed; it still fails when the shares are wrong.
    """

    def __init__(self, strata: Strata, size: int, seed: int):
        self.size, self.seed = size, seed
        self._rows = [(strata.group_of_row == group).nonzero().flatten() for group in range(len(strata.shares))]
        edges = size * strata.shares.cumsum(0)
        self._edges = torch.cat([edges.new_zeros(1), edges[:-1], edges.new_tensor([size])])
        self._counted = 0
        self._drawn_before = torch.zeros(len(self._rows), dtype=torch.int64)

    def counts(self, epoch: int) -> Tensor:
        """How often each group is drawn in an epoch. K, int64."""
        offset = mix(self.seed, "groups", epoch) / 2**63
        return torch.ceil(self._edges - offset).diff().long()

    def order(self, epoch: int) -> Tensor:
        """The rows of an epoch. size, int64."""
        starts, counts = self._counts_before(epoch).tolist(), self.counts(epoch).tolist()
        drawn = torch.cat([self._turns(group, *span) for group, span in enumerate(zip(starts, counts, strict=True))])
        return drawn[_permutation(self.size, self.seed, "order", epoch)]

    def _counts_before(self, epoch: int) -> Tensor:
        """How often each group is drawn in all epochs before this one: remembered, as epochs are asked for in turn."""
        if epoch < self._counted:
            self._counted, self._drawn_before = 0, torch.zeros_like(self._drawn_before)
        while self._counted < epoch:
            self._drawn_before = self._drawn_before + self.counts(self._counted)
            self._counted += 1
        return self._drawn_before

    def _turns(self, group: int, start: int, count: int) -> Tensor:
        """`count` rows of a group, beginning with the `start`-th of all its draws."""
        rows = self._rows[group]
        first, stop = start // len(rows), -(-(start + count) // len(rows))
        turns = [rows[_permutation(len(rows), self.seed, "turn", group, turn)] for turn in range(first, stop)]
        return torch.cat([rows[:0], *turns])[start - first * len(rows) :][:count]


class StepSampler(Sampler[list[SampleKey]]):
    """Batches of keys for the steps `start_step <= step < stop_step`, `gradient_accumulation_steps` of them a step.

    An epoch is a seeded permutation of the dataset; its remainder is dropped: `num_samples // G` steps an epoch. With
    `strata` an epoch has as many steps, of rows drawn by `StratifiedDraw`; nothing is dropped of what it draws.
    """

    def __init__(
        self,
        num_samples: int,
        layout: BatchLayout,
        seed: int,
        start_step: int = 0,
        stop_step: int = 0,
        strata: Strata | None = None,
    ):
        self.num_samples = num_samples
        self.layout = layout
        self.seed = seed
        self.start_step = start_step
        self.stop_step = stop_step
        self.steps_per_epoch = num_samples // layout.global_batch_size
        size = self.steps_per_epoch * layout.global_batch_size
        self._draw = StratifiedDraw(strata, size, seed) if strata is not None else None
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self.layout.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for step in range(self.start_step, self.stop_step):
            for micro_batch in range(self.layout.gradient_accumulation_steps):
                yield self.keys(step, micro_batch)

    def keys(self, step: int, micro_batch: int) -> list[SampleKey]:
        """The keys of this process's `micro_batch`-th batch in `step` (both from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._rows_of(epoch).tolist()
            self._epoch = epoch
        first = step_in_epoch * self.layout.global_batch_size
        return [
            SampleKey(self._order[first + position], mix(self.seed, "sample", step, position))
            for position in self.layout.positions(micro_batch)
        ]

    def _rows_of(self, epoch: int) -> Tensor:
        if self._draw is not None:
            return self._draw.order(epoch)
        return _permutation(self.num_samples, self.seed, "order", epoch)


def _permutation(size: int, *seed: int | str) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(mix(*seed)))
