"""Memorization: whether a model returns its training images instead of new ones.

A generated image is compared with all training images, in pixels, in latents or in features of a network.
Near in absolute terms is not enough: images of a plain collection are all near each other. The test is therefore that
of Carlini et al. 2023 (arXiv:2301.13188, section 5.1): the distance to the nearest training image, divided by the mean
distance to the nearest 50. Held-out real images give the distribution of this ratio if nothing is copied, and from it
the threshold, so that the rate of false positives is known.

m generated images, n training images, D values per image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NEIGHBOURS = 50
FALSE_POSITIVE_RATE = 0.01
# Training images per block of the search: with 10,000 queries, a block of distances takes 160 MB.
BLOCK = 4096
THUMBNAIL = 32
# A generated image may be mirrored or moved by a cell of its thumbnail (3 % of its width) in each direction.
SHIFTS = (-1, 0, 1)
# Root mean square difference of pixel values in [0, 1] below which a copy is called exact: JPEG of high quality, or a
# round trip through a good autoencoder, changes an image by about as much.
EXACT = 0.02


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


def nearest_neighbours(
    queries: Tensor, training: Tensor | Iterable[Tensor], neighbours: int = NEIGHBOURS
) -> Neighbours:
    """Search the nearest training images of each query, block by block, on the device of the queries.

    Args:
        queries: m D
        training: n D, or an iterable over blocks of rows (each ? D) if all together do not fit in memory.
        neighbours: k; lowered to the number of training images.

    Returns:
        Distances in float32: products of values far from 0 cost precision, so queries and training images are moved by
        the mean of the first block.

    Raises:
        ValueError: there are no training images.
    """
    blocks = training.split(BLOCK) if isinstance(training, Tensor) else training
    best: Neighbours | None = None
    shift: Tensor | None = None
    start = 0
    for whole in blocks:
        for block in whole.split(BLOCK):
            block = block.to(queries.device, torch.float32)
            shift = block.mean(0) if shift is None else shift
            distances = torch.cdist(queries.float() - shift, block - shift)
            rows = torch.arange(start, start + len(block), device=queries.device).expand(len(queries), -1)
            best = _merge(best, distances, rows, neighbours)
            start += len(block)
    if best is None:
        raise ValueError("there are no training images to compare with")
    return Neighbours(best.distances.cpu(), best.rows.cpu())


def _merge(best: Neighbours | None, distances: Tensor, rows: Tensor, neighbours: int) -> Neighbours:
    k = min(neighbours, distances.shape[1])
    near, columns = distances.topk(k, largest=False)
    found = rows.gather(1, columns)
    if best is None:
        return Neighbours(near, found)
    near, found = torch.cat([best.distances, near], 1), torch.cat([best.rows, found], 1)
    order = near.topk(min(neighbours, near.shape[1]), largest=False)
    return Neighbours(order.values, found.gather(1, order.indices))


def thumbnails(images: Sequence[Image.Image]) -> Tensor:
    """Return images as small RGB vectors with values in [0, 1], whose Euclidean distance is the root mean square
    difference of their pixels: m 3072."""
    size = (THUMBNAIL, THUMBNAIL)
    arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).flatten(1) / 255 / math.sqrt(THUMBNAIL * THUMBNAIL * 3)


def views(images: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """Return the images mirrored or not and moved by up to 3 % of their size: 18 lists of m images, the first with the
    images as they are. Edges are repeated."""
    moves = sorted(((x, y) for x in SHIFTS for y in SHIFTS), key=lambda move: move != (0, 0))
    both = [list(images), [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]]
    return [[_moved(image, *move) for image in side] for move in moves for side in both]


def _moved(image: Image.Image, right: int, down: int) -> Image.Image:
    if not right and not down:
        return image
    x, y = round(image.width * right / THUMBNAIL), round(image.height * down / THUMBNAIL)
    pad_x, pad_y = abs(x), abs(y)
    array = np.pad(np.asarray(image.convert("RGB")), ((pad_y, pad_y), (pad_x, pad_x), (0, 0)), mode="edge")
    return Image.fromarray(array[pad_y - y : pad_y - y + image.height, pad_x - x : pad_x - x + image.width])


def pixel_neighbours(images: Sequence[Image.Image], training: Tensor, neighbours: int = NEIGHBOURS) -> Neighbours:
    """Search the nearest training images in pixels, with mirrored and moved views of the images.

    Args:
        training: `thumbnails` of the training images, n 3072.
    """
    found: Neighbours | None = None
    for view in views(images):
        there = nearest_neighbours(thumbnails(view), training, neighbours)
        found = there if found is None else found.nearer(there)
    assert found is not None
    return found


def calibrated_threshold(ratios: Tensor, rate: float = FALSE_POSITIVE_RATE) -> tuple[float, float]:
    """Return the threshold for ratios below which an image counts as a copy, and its false-positive rate.

    Args:
        ratios: ratios of held-out real images, h
        rate: the intended rate; with few held-out images the lowest possible is 1 / (h + 1).

    Returns:
        The k-th smallest ratio, with k = max(1, floor(rate · (h + 1))), and the rate k / (h + 1), which is exact in the
        mean over held-out sets if generated images that are no copies are distributed like held-out ones.
    """
    held_out = len(ratios)
    k = max(1, math.floor(rate * (held_out + 1)))
    return float(ratios.kthvalue(k).values), k / (held_out + 1)


def wilson_interval(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion (Wilson 1927)."""
    share, spread = count / total, z * z / total
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


@dataclass(frozen=True)
class CopyReport:
    """The verdict on a set of generated images in one space."""

    space: str
    num_images: int
    num_training: int
    num_held_out: int
    threshold: float
    false_positive_rate: float
    copies: int
    exact_copies: int
    copy_rate: float
    lowest_rate: float
    highest_rate: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def exceeds(self, tolerance: float) -> bool:
        """Return whether even the lower end of the 95 % interval is above the false-positive rate plus `tolerance`."""
        return self.lowest_rate > self.false_positive_rate + tolerance


def report(
    space: str, generated: Neighbours, held_out: Neighbours, num_training: int, exact_below: float = 0.0
) -> CopyReport:
    """Judge generated images by the ratios of held-out real ones.

    Args:
        exact_below: distance below which a copy counts as exact.
    """
    threshold, rate = calibrated_threshold(held_out.ratios)
    copied = generated.ratios < threshold
    copies, total = int(copied.sum()), len(copied)
    lowest, highest = wilson_interval(copies, total)
    exact = int((copied & (generated.distances[:, 0] < exact_below)).sum())
    return CopyReport(
        space, total, num_training, len(held_out.rows), threshold, rate, copies, exact, copies / total, lowest, highest
    )
