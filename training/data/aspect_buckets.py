"""Aspect buckets (`--aspect_buckets true`): a few sizes of training images, so that hardly anything is cut off.

Every image is trained on in the size whose aspect ratio is nearest to its own, and all images of a global batch have
the same size.

N rows, H W pixels of a bucket. Sizes of buckets are (height, width), as in Diffusers; sizes of image files are (width,
height), as in Pillow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipelines.tools.cli import UserError
from training.core.checks import SMALLEST_MAP
from training.data.records import read_record, write_record
from training.data.transforms import BrokenImage, verify_image

if TYPE_CHECKING:
    from datasets import Dataset

Size = tuple[int, int]
UNREADABLE: Size = (0, 0)
_ROWS_PER_READ = 64


@dataclass(frozen=True)
class BucketRule:
    """What buckets are made by.

    Attributes:
        resolution: a bucket has about resolution² pixels.
        divisor: every side is a multiple of it.
        least_images: a bucket with fewer images joins its nearest neighbour.
        least_cells: no side is shorter than this many times `divisor`.
    """

    resolution: int
    divisor: int
    least_images: int = 1
    least_cells: int = SMALLEST_MAP

    @property
    def least_side(self) -> int:
        return self.divisor * self.least_cells

    def require_rectangles(self) -> None:
        """Raise UserError if only squares have sides of at least `least_side`, with `resolution` squared pixels."""
        if self.resolution <= self.least_side:
            raise UserError(
                f"--aspect_buckets true: at --resolution {self.resolution} all images would be squares, because the "
                f"sides must be multiples of {self.divisor} and at least {self.least_side} pixels for this network; "
                "use a larger --resolution, fewer levels (block_out_channels) or smaller patches, or leave the flag out"
            )


@dataclass(frozen=True)
class AspectBuckets:
    """Sizes (height, width) of training images, that with the most images first."""

    sizes: tuple[Size, ...]

    def nearest(self, images: Sequence[Size]) -> Tensor:
        """Return the bucket of each image by the ratio of its size (width, height). N, int64.

        An image that cannot be read gets bucket 0.
        """
        known = dict.fromkeys(images, 0)
        readable = [size for size in known if size != UNREADABLE]
        known |= dict(zip(readable, _nearest(readable, self.sizes), strict=True))
        return torch.tensor([known[size] for size in images], dtype=torch.int64)


class InBuckets:
    """Adds the sizes of the samples to a dataset.

    Attributes:
        sizes: (height, width) of the samples; the first size is that of most training images.
        batch_groups: the place in `sizes` of each row, N, int64; None if all rows have the first size.
    """

    sizes: tuple[Size, ...]
    batch_groups: Tensor | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def take_buckets(self, buckets: AspectBuckets, images: Sequence[Size]) -> None:
        """Set the sizes for images of these sizes (width, height), one for each row."""
        self.sizes = buckets.sizes
        self.batch_groups = buckets.nearest(images) if len(buckets.sizes) > 1 else None

    def size_of(self, index: int) -> Size:
        """Return (height, width) of the sample of a row."""
        return self.sizes[self.place_of_size(index)]

    def place_of_size(self, index: int) -> int:
        """Return the place in `sizes` of the size of a row."""
        return 0 if self.batch_groups is None else int(self.batch_groups[index])

    def table_of_sizes(self) -> str:
        """Describe how many rows have each size, in one line for each size."""
        groups = torch.zeros(len(self), dtype=torch.int64) if self.batch_groups is None else self.batch_groups
        counts = torch.bincount(groups, minlength=len(self.sizes)).tolist()
        return "\n".join(f"  {h}×{w}: {count:,} images" for (h, w), count in zip(self.sizes, counts, strict=True))

    def next_index(self, index: int) -> int:
        """Return the next row with samples of the same size; the first one after the last one."""
        if self.batch_groups is None:
            return (index + 1) % len(self)
        rows = (self.batch_groups == self.batch_groups[index]).nonzero().flatten()
        return int(rows[int((rows <= index).sum()) % len(rows)])


def kept_size(size: Size, crop_scale: float, most: Size | None = None) -> Size:
    """Return the size at which the largest crop is kept, from which the smallest crop has all of its pixels.

    Args:
        size: (height, width) of a sample.
        most: size of the largest crop itself; nothing is gained by enlarging it.
    """
    height, width = math.ceil(size[0] / crop_scale), math.ceil(size[1] / crop_scale)
    enlarged = most is not None and (most[0] < height or most[1] < width)
    return most if most is not None and enlarged and crop_scale < 1 else (height, width)


def make_buckets(images: Sequence[Size], rule: BucketRule) -> AspectBuckets:
    """Return the buckets for images of these sizes (width, height).

    Diffusers' `generate_aspect_ratio_buckets` makes a bucket for each ratio that occurs, and rounds its sides. Ratios
    whose shorter side would be below `rule.least_side` are made less extreme before that. Its `find_nearest_bucket`
    compares h · W with w · H, which depends on the sizes as well as on the ratios, so `_nearest` replaces it.
    """
    from diffusers.training_utils import generate_aspect_ratio_buckets

    rule.require_rectangles()
    counts = Counter(size for size in images if size != UNREADABLE)
    limit = rule.resolution**2 / rule.least_side**2
    ratios = sorted({min(max(width / height, 1 / limit), limit) for width, height in counts}) or [1.0]
    sizes = generate_aspect_ratio_buckets(
        rule.resolution, divisibility=rule.divisor, base_resolutions=[(1.0, ratio) for ratio in ratios]
    )
    sizes = sorted(sizes)
    while True:
        found = dict(zip(counts, _nearest(list(counts), sizes), strict=True))
        numbers = [0] * len(sizes)
        for size, count in counts.items():
            numbers[found[size]] += count
        smallest = min(range(len(sizes)), key=lambda bucket: numbers[bucket])
        if len(sizes) == 1 or numbers[smallest] >= max(1, rule.least_images):
            order = sorted(range(len(sizes)), key=lambda bucket: (-numbers[bucket], sizes[bucket]))
            return AspectBuckets(tuple(sizes[bucket] for bucket in order))
        # Its images go to the nearest of the remaining buckets, one bucket at a time: two small neighbours may
        # together be large enough.
        del sizes[smallest]


def sort_into_buckets(
    datasets: Sequence[Any], rule: BucketRule, poll: Callable[[], None] = lambda: None
) -> AspectBuckets:
    """Make buckets for the images of the first dataset, and put the images of all datasets into them."""
    buckets = make_buckets(datasets[0].image_sizes(poll), rule)
    for data in datasets:
        data.put_in_buckets(buckets, poll)
    return buckets


def _nearest(images: Sequence[Size], buckets: Sequence[Size]) -> list[int]:
    """Return the bucket with the smallest |log ratio of the ratios| for each image; of equal ones, the first."""
    if not images:
        return []
    ratios = np.log([width / height for width, height in images])
    of_buckets = np.log([width / height for height, width in buckets])
    # Rounded, so that an image exactly between two buckets gets the same one on every machine.
    return np.abs(ratios[:, None] - of_buckets[None]).round(9).argmin(1).tolist()


def share_cut_off(images: Sequence[Size]) -> float:
    """Return the mean share of the pixels of images of these sizes (width, height) that a square crop leaves out."""
    shares = [1 - min(size) / max(size) for size in images if size != UNREADABLE]
    return sum(shares) / max(1, len(shares))


def image_sizes(rows: Dataset, column: str, key: str | None, poll: Callable[[], None] = lambda: None) -> list[Size]:
    """Return (width, height) of the upright image of each row, which is decoded for it, as cheaply as possible.

    Args:
        rows: with undecoded images in `column`.
        key: of the record that keeps the sizes for the next start; None keeps none.
        poll: called now and then; it may raise to stop.
    """
    known = read_record("image-sizes", [key, column]) if key else None
    if isinstance(known, list) and len(known) == len(rows):
        return [(width, height) for width, height in known]
    images, sizes = rows.select_columns([column]), []
    for start in range(0, len(rows), _ROWS_PER_READ):
        poll()
        sizes += [_size_of(source) for source in images[start : start + _ROWS_PER_READ][column]]
    if key:
        write_record("image-sizes", [key, column], sizes)
    return sizes


def _size_of(source: object) -> Size:
    """Return the size of an image; `UNREADABLE` for a damaged one, about which the checks of the data say more."""
    try:
        size = verify_image(source)
    except BrokenImage:
        return UNREADABLE
    return size if math.prod(size) else UNREADABLE
