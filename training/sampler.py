"""Which sample sits where, and every random number: functions of (seed, step, position in the global batch).

Nothing here has a state to save. A run that is resumed, or spread over other processes, asks the same questions and
gets the same answers.

    B  micro-batch size on one process        G  global batch size = B × processes × accumulation
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """What the sampler yields for one position: the dataset row, and the seed of that sample's own randomness."""

    index: int  # type: ignore[assignment]  # shadows tuple.index
    key: int


def mix(*parts: int | str) -> int:
    """A 63-bit seed from integers and words; the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is split over processes and micro-batches.

    The positions of a global batch are dealt out micro-batch by micro-batch and, within one, process by process, so
    that any two layouts of equal `global_batch_size` train on the same set of samples in each step.
    """

    train_batch_size: int
    num_processes: int = 1
    gradient_accumulation_steps: int = 1
    rank: int = 0

    @property
    def global_batch_size(self) -> int:
        return self.train_batch_size * self.num_processes * self.gradient_accumulation_steps

    def positions(self, micro_batch: int) -> range:
        """This process's positions in the global batch for one of its micro-batches."""
        start = (micro_batch * self.num_processes + self.rank) * self.train_batch_size
        return range(start, start + self.train_batch_size)


class StepSampler(Sampler[list[SampleKey]]):
    """Batches of keys for the steps `start_step <= step < stop_step`, `gradient_accumulation_steps` of them a step.

    An epoch is a seeded permutation of the dataset; its remainder is dropped: `num_samples // G` steps an epoch.
    """

    def __init__(self, num_samples: int, layout: BatchLayout, seed: int, start_step: int = 0, stop_step: int = 0):
        self.num_samples = num_samples
        self.layout = layout
        self.seed = seed
        self.start_step = start_step
        self.stop_step = stop_step
        self.steps_per_epoch = num_samples // layout.global_batch_size
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
            generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
            self._order = torch.randperm(self.num_samples, generator=generator).tolist()
            self._epoch = epoch
        first = step_in_epoch * self.layout.global_batch_size
        return [
            SampleKey(self._order[first + position], mix(self.seed, "sample", step, position))
            for position in self.layout.positions(micro_batch)
        ]


class Draws:
    """The random numbers of one micro-batch: row i is a function of (seed, step, positions[i], name) alone.

    Drawn on the CPU whatever the device, so that a run moved to other hardware sees the same noise.
    """

    def __init__(self, seed: int, step: int | str, positions: Sequence[int], device: torch.device | str = "cpu"):
        self.seed = seed
        self.step = step
        self.positions = positions
        self.device = device

    def __len__(self) -> int:
        return len(self.positions)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, B × shape, float32. `name` tells apart the draws of one sample."""
        return self._fill(name, shape, torch.Tensor.normal_)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Numbers uniform in [0, 1), B × shape, float32."""
        return self._fill(name, shape, torch.Tensor.uniform_)

    def _fill(self, name: str, shape: Sequence[int], fill) -> Tensor:
        rows = torch.empty(len(self.positions), *shape)
        generator = torch.Generator()
        for row, position in zip(rows, self.positions, strict=True):
            generator.manual_seed(mix(self.seed, "draw", self.step, position, name))
            fill(row, generator=generator)
        return rows.to(self.device, non_blocking=True)
