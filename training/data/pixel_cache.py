"""Cropped and resized images in memory, so that a photograph is decoded once and not in every epoch."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import psutil

MOST_BYTES = 4 * 2**30
_SHARE_OF_FREE_MEMORY = 0.25


class PixelCache:
    """The pixels of the rows that were read so far: uint8 R R 3 for each row.

    Loader processes that are forked share the memory. A process that is started in another way begins with an empty
    cache. The memory of a row is used only when the row is read.
    """

    def __init__(self, rows: int, resolution: int):
        self.rows, self.resolution = rows, resolution
        # Anonymous memory, which a fork shares, and which is not limited by the size of /dev/shm.
        memory = mmap.mmap(-1, rows * (1 + 3 * resolution**2))
        self._is_known = np.frombuffer(memory, np.uint8, rows)
        self._pixels = np.frombuffer(memory, np.uint8, offset=rows).reshape(rows, resolution, resolution, 3)

    @classmethod
    def of(cls, rows: int, resolution: int) -> PixelCache | None:
        """Return an empty cache, or None if all rows would need too much of the free memory."""
        size = rows * 3 * resolution**2
        if not rows or size > min(MOST_BYTES, _SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available):
            return None
        return cls(rows, resolution)

    def get(self, row: int) -> np.ndarray | None:
        """Return a copy of the pixels of a row, uint8 R R 3; None if they were not stored yet."""
        return self._pixels[row].copy() if self._is_known[row] else None

    def put(self, row: int, pixels: np.ndarray) -> None:
        self._pixels[row] = pixels
        self._is_known[row] = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return PixelCache, (self.rows, self.resolution)
