"""The random numbers of a run: each is a function of (seed, step, position in the global batch, name).

Nothing here has a state to save. A run that is resumed, or distributed over another number of processes, draws the same
numbers.

B batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SampleKey(NamedTuple):
    """One position of a batch: the index of the dataset row, and a seed for the random transforms of this sample."""

    index: int  # type: ignore[assignment]  # it replaces the method tuple.index
    key: int


def mix(*parts: int | str) -> int:
    """Return a 63-bit seed derived from integers and strings; it is the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class Draws:
    """The random numbers of one micro-batch: row i is a function of (seed, step, positions[i], name) alone.

    They are drawn on the CPU for any device, so that a run that moves to other hardware gets the same noise.
    """

    def __init__(self, seed: int, step: int | str, positions: Sequence[int], device: torch.device | str = "cpu"):
        self.seed = seed
        self.step = step
        self.positions = positions
        self.device = device

    def __len__(self) -> int:
        return len(self.positions)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers, B × shape, float32. Different names give independent numbers."""
        return self._fill(name, shape, torch.Tensor.normal_)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Return numbers uniform in [0, 1), B × shape, float32. Different names give independent numbers."""
        return self._fill(name, shape, torch.Tensor.uniform_)

    def _fill(self, name: str, shape: Sequence[int], fill) -> Tensor:
        rows = torch.empty(len(self.positions), *shape)
        generator = torch.Generator()
        for row, position in zip(rows, self.positions, strict=True):
            generator.manual_seed(mix(self.seed, "draw", self.step, position, name))
            fill(row, generator=generator)
        return rows.to(self.device, non_blocking=True)
