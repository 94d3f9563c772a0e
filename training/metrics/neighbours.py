"""The nearest training images of other images, in pixels or in vectors such as latents.

Training images arrive in blocks, so there may be more of them than fit in memory, and several processes may divide the
blocks among them. m queries, n training images, V views of each query, D values per image, k neighbours.
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
from training.core.exchange import ALONE, Exchange

NEIGHBOURS = 50
# Training images that are compared at a time. Processes divide whole blocks among them: smaller ones keep more of them
# busy, and take more time in total. With 10,000 queries, a block of distances takes 20 MB, and their keys 40 MB.
BLOCK = 512
THUMBNAIL = 32
# A key of a neighbour has the bits of its distance above those of its row.
ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1
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


class NeighbourSearch:
    """Searches the nearest training images of some queries, on the device of the queries.

    Several processes may search: each adds its blocks of the training images, and `result` is that of all of them, bit
    for bit as if one process had added all blocks. Of training images at the same distance, the first ones are nearer.

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
        self._views, self._own_rows, self._scale, self._neighbours = views, own_rows, scale, neighbours
        # Products of values far from 0 cost precision. The queries are the same on every process.
        self._centre = scale(views[0]).mean(0)
        self._found: dict[int, Tensor] = {}  # the keys of the nearest images for each view, m k
        self._next_row = self._count = 0

    def add(self, training: Tensor, first_row: int | None = None) -> None:
        """Compare all queries with training images: ? D

        Args:
            first_row: the row of the first of them; None if they follow those that were added before.
        """
        start = self._next_row if first_row is None else first_row
        for part in training.split(BLOCK):
            block = self._scale(part.to(self._views[0].device)) - self._centre
            rows = torch.arange(start, start + len(block), device=block.device)
            for number, view in enumerate(self._views):
                near = self._nearest(self._keys(view, block, rows))
                known = self._found.get(number)
                self._found[number] = near if known is None else self._nearest(torch.cat([known, near], 1))
            start += len(block)
        self._next_row, self._count = start, self._count + len(training)

    def _keys(self, view: Tensor, block: Tensor, rows: Tensor) -> Tensor:
        """Return for each query and training image of a block a number (int64) that sorts by distance, then by row."""
        distances = torch.cdist(self._scale(view) - self._centre, block).abs()
        if self._own_rows is not None:
            distances[self._own_rows.to(rows.device)[:, None] == rows] = torch.inf
        return (distances.view(torch.int32).long() << ROW_BITS) | rows

    def _nearest(self, keys: Tensor) -> Tensor:
        return keys.topk(min(self._neighbours, keys.shape[1]), largest=False).values

    def result(self, exchange: Exchange = ALONE) -> Neighbours:
        """Return the neighbours among all training images so far, on the CPU; every process of the exchange calls it.

        Raises:
            ValueError: no process has added anything before.
        """
        found = torch.stack(list(self._found.values())).cpu() if self._found else None  # V m k
        everywhere = exchange.gather((self._count, None if found is None else found[..., 0].clone()))
        firsts = [keys for _, keys in everywhere if keys is not None]
        if not firsts:
            raise ValueError("the number of training images is 0")
        # The view with the nearest image counts, and the first one of several that are as near.
        numbers = torch.arange(len(self._views))[:, None]
        best = ((torch.stack(firsts).amin(0) & ~ROW_MASK) | numbers).amin(0) & ROW_MASK
        own = None if found is None else found[best, torch.arange(len(best))]
        keys = torch.cat([part for part in exchange.gather(own) if part is not None], 1)
        compared = sum(count for count, _ in everywhere) - (self._own_rows is not None)
        keys = keys.topk(min(self._neighbours, compared), largest=False).values
        return Neighbours((keys >> ROW_BITS).int().view(torch.float32), keys & ROW_MASK)


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
