"""Cropped and resized images in memory, so that a photograph is decoded once and not in every epoch."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import psutil

MOST_BYTES = 4 * 2**30
_SHARE_OF_FREE_MEMORY = 0.25
_BYTES_OF_A_SIDE = 2


class PixelCache:
    """The pixels of the rows that were read so far: a square of at most `side` × `side` pixels for each row.

    Loader processes that are forked share the memory. A process that is started in another way begins with an empty
    cache. The memory of a row is used only when the row is read.
    """

    def __init__(self, rows: int, side: int, channels: int = 3):
        self.rows, self.side, self.channels = rows, side, channels
        # Anonymous memory, which a fork shares, and which is not limited by the size of /dev/shm.
        memory = mmap.mmap(-1, rows * (_BYTES_OF_A_SIDE + channels * side**2))
        self._sides = np.frombuffer(memory, np.uint16, rows)
        self._pixels = np.frombuffer(memory, np.uint8, offset=rows * _BYTES_OF_A_SIDE).reshape(rows, -1)

    @classmethod
    def of(cls, rows: int, side: int, channels: int = 3) -> PixelCache | None:
        """Return an empty cache, or None if all rows would need too much of the free memory."""
        size = rows * channels * side**2
        if not rows or size > min(MOST_BYTES, _SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available):
            return None
        return cls(rows, side, channels)

    def get(self, row: int) -> np.ndarray | None:
        """Return a copy of the pixels of a row, uint8 S S C with S <= side; None if they were not stored yet.

        Those of a grey image are S S, as in Pillow.
        """
        side = int(self._sides[row])
        shape = (side, side, self.channels) if self.channels > 1 else (side, side)
        return self._pixels[row, : self.channels * side**2].reshape(shape).copy() if side else None

    def put(self, row: int, pixels: np.ndarray) -> None:
        """Store the pixels of a row, uint8 S S C with S <= side."""
        side = len(pixels)
        self._pixels[row, : self.channels * side**2] = pixels.reshape(-1)
        self._sides[row] = side

    def __reduce__(self) -> tuple[Any, ...]:
        return PixelCache, (self.rows, self.side, self.channels)
