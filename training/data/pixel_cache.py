"""Cropped and resized images in memory, so that a photograph is decoded once and not in every epoch."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import psutil

MOST_BYTES = 4 * 2**30
_SHARE_OF_FREE_MEMORY = 0.25
_BYTES_OF_A_SIZE = 4  # height and width, uint16 each


class PixelCache:
    """The pixels of the rows that were read so far: up to `most_pixels` for each row, in a rectangle of any shape.

    Loader processes that are forked share the memory. A process that is started in another way begins with an empty
    cache. The memory of a row is used only when the row is read.
    """

    def __init__(self, rows: int, most_pixels: int, channels: int = 3):
        self.rows, self.most_pixels, self.channels = rows, most_pixels, channels
        # Anonymous memory, which a fork shares, and which is not limited by the size of /dev/shm.
        memory = mmap.mmap(-1, rows * (_BYTES_OF_A_SIZE + channels * most_pixels))
        self._sizes = np.frombuffer(memory, np.uint16, 2 * rows).reshape(rows, 2)
        self._pixels = np.frombuffer(memory, np.uint8, offset=rows * _BYTES_OF_A_SIZE).reshape(rows, -1)

    @classmethod
    def of(cls, rows: int, most_pixels: int, channels: int = 3) -> PixelCache | None:
        """Return an empty cache, or None if all rows would need too much of the free memory."""
        size = rows * channels * most_pixels
        if not rows or size > min(MOST_BYTES, _SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available):
            return None
        return cls(rows, most_pixels, channels)

    def __contains__(self, row: int) -> bool:
        return bool(self._sizes[row, 1])

    def get(self, row: int) -> np.ndarray | None:
        """Return a copy of the pixels of a row, uint8 H W C; None if they were not stored yet.

        Those of a grey image are H W, as in Pillow.
        """
        height, width = map(int, self._sizes[row])
        shape = (height, width, self.channels) if self.channels > 1 else (height, width)
        return self._pixels[row, : self.channels * height * width].reshape(shape).copy() if width else None

    def put(self, row: int, pixels: np.ndarray) -> None:
        """Store the pixels of a row, uint8 H W C with H · W <= most_pixels."""
        self._pixels[row, : pixels.size] = pixels.reshape(-1)
        # The width last: another process that sees it finds everything else in place.
        self._sizes[row, 0] = pixels.shape[0]
        self._sizes[row, 1] = pixels.shape[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return PixelCache, (self.rows, self.most_pixels, self.channels)
