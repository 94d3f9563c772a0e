"""Blocks of rows that are stored together, as in a shard: to read them in turn is faster than to read them anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowBlocks:
    """The blocks of a dataset, whose rows follow one another.

    Attributes:
        starts: K + 1, int64: the first row of each of the K blocks, and the number of all rows.
        window: number of rows that are shuffled together; the last block of a window is taken as a whole.
    """

    starts: Tensor
    window: int
