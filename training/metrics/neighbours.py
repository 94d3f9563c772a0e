"""The nearest training images of other images, in pixels or in vectors such as latents.

Training images arrive in blocks, so there may be more of them than fit in memory. m queries, n training images, D
values per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.common.pixels import to_rgb

NEIGHBOURS = 50
# Training images per block of the search: with 10,000 queries, a block of distances takes 160 MB.
BLOCK = 4096
THUMBNAIL = 32
# A generated image may be mirrored or moved by a cell of its thumbnail (3 % of its width) in each direction.
SHIFTS = (-1, 0, 1)


@dataclass(frozen=True)
class Neighbours:
    """The k nearest training images of each query, nearest first: distances m k (Euclidean) and rows m k (int64)."""

    distances: Tensor
    rows: Tensor

    @property
    def ratios(self) -> Tensor:
        """Distance to the nearest image divided by the mean of all k, from 0 (a copy) to 1: m"""
        return self.distances[:, 0] / self.distances.mean(1).clamp_min(1e-12)

    def nearer(self, other: Neighbours) -> Neighbours:
        """Return for each query the neighbours of whichever of the two has the nearer image."""
        better = (other.distances[:, 0] < self.distances[:, 0])[:, None]
        return Neighbours(
            torch.where(better, other.distances, self.distances), torch.where(better, other.rows, self.rows)
        )

    def without(self, own_rows: Tensor) -> Neighbours:
        """Remove from the neighbours of each query one row, its own, or else the last one: m k -> m (k - 1)"""
        is_own = self.rows == own_rows[:, None]
        is_own[~is_own.any(1), -1] = True
        shape = (len(self.rows), self.rows.shape[1] - 1)
        return Neighbours(self.distances[~is_own].reshape(shape), self.rows[~is_own].reshape(shape))


class NeighbourSearch:
    """Searches the nearest training images of some queries, on the device of the queries.

    Args:
        views: queries, m D, or the same queries in several forms (mirrored, moved), of which the nearest one counts.
        own_rows: the row of each query if the queries are training images; it is not compared with itself.
        neighbours: k; lowered to the number of training images.
        scale: returns queries and training images as numbers in float32.
    """

    def __init__(
        self,
        views: Sequence[Tensor],
        own_rows: Tensor | None = None,
        neighbours: int = NEIGHBOURS,
        scale: Callable[[Tensor], Tensor] = Tensor.float,
    ):
        self._views, self._own_rows, self._scale = views, own_rows, scale
        self._neighbours = neighbours + (own_rows is not None)
        self._found: list[Neighbours | None] = [None] * len(views)
        self._shift: Tensor | None = None
        self._start = 0

    def add(self, training: Tensor) -> None:
        """Compare all queries with the next training images: ? D"""
        for part in training.split(BLOCK):
            block = self._scale(part.to(self._views[0].device))
            if self._shift is None:  # products of values far from 0 cost precision
                self._shift = block.mean(0)
            block = block - self._shift
            rows = torch.arange(self._start, self._start + len(block), device=block.device)
            for number, view in enumerate(self._views):
                distances = torch.cdist(self._scale(view) - self._shift, block)
                self._found[number] = self._merged(self._found[number], distances, rows)
            self._start += len(block)

    def _merged(self, found: Neighbours | None, distances: Tensor, rows: Tensor) -> Neighbours:
        near, columns = distances.topk(min(self._neighbours, distances.shape[1]), largest=False)
        near_rows = rows[columns]
        if found is None:
            return Neighbours(near, near_rows)
        near, near_rows = torch.cat([found.distances, near], 1), torch.cat([found.rows, near_rows], 1)
        order = near.topk(min(self._neighbours, near.shape[1]), largest=False)
        return Neighbours(order.values, near_rows.gather(1, order.indices))

    def result(self) -> Neighbours:
        """Return the neighbours among all training images so far, on the CPU.

        Raises:
            ValueError: nothing was added before.
        """
        best: Neighbours | None = None
        for found in self._found:
            if found is None:
                raise ValueError("the number of training images is 0")
            view = Neighbours(found.distances.cpu(), found.rows.cpu())
            view = view if self._own_rows is None else view.without(self._own_rows)
            best = view if best is None else best.nearer(view)
        assert best is not None
        return best


def pixel_search(small: Tensor, own_rows: Tensor | None = None) -> NeighbourSearch:
    """Return a search in pixels, with mirrored and moved views. Training images are added as thumbnails as well.

    Distances are root mean square differences of pixel values in [0, 1].

    Args:
        small: `thumbnails` of the queries, m 3072
        own_rows: see `NeighbourSearch`.
    """
    return NeighbourSearch(views(small), own_rows, scale=_scaled)


def thumbnails(images: Sequence[Image.Image]) -> Tensor:
    """Return images as small RGB vectors: m 3072, uint8, so that a million of them take 3 GB."""
    size = (THUMBNAIL, THUMBNAIL)
    arrays = [np.asarray(to_rgb(image).resize(size, Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(arrays)).flatten(1)


def _scaled(small: Tensor) -> Tensor:
    return small.float() / 255 / math.sqrt(small.shape[1])


def views(small: Tensor) -> list[Tensor]:
    """Return thumbnails (m 3072) mirrored or not and moved by up to one cell (3 % of the size) in each direction.

    The result has 18 tensors, the first with the thumbnails as they are. Edges are repeated.
    """
    grid = small.reshape(-1, THUMBNAIL, THUMBNAIL, 3)
    moves = sorted(((x, y) for x in SHIFTS for y in SHIFTS), key=lambda move: move != (0, 0))
    places = torch.arange(THUMBNAIL)
    rows = {shift: (places + shift).clamp(0, THUMBNAIL - 1) for shift in SHIFTS}
    both = (grid, grid.flip(2))
    return [side[:, rows[y]][:, :, rows[x]].flatten(1) for x, y in moves for side in both]
