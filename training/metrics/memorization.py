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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.tools.cli import UserError
from pipelines.tools.grids import comparison_grid
from training.metrics.generators import SamplingConfig, generator_of
from training.metrics.images import to_pil

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
# With fewer held-out images, the false-positive rate could not be as low as 1 %.
FEWEST_HELD_OUT = 99
MOST_CALIBRATION = 1000
AMONG_THEMSELVES = "training images, each compared with the others"
# Copies are reported as a fact if they exceed the false-positive rate by more than one percentage point.
TOLERANCE = 0.01
FEWEST_FOR_VERDICT = 1000
SHEET_PAIRS = 12

Images: TypeAlias = Tensor | Sequence[Image.Image] | Iterable[Any]


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
        ValueError: the number of training images is 0.
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
        raise ValueError("the number of training images is 0")
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
    """Return images as small RGB vectors: m 3072, uint8, so that a million of them take 3 GB."""
    size = (THUMBNAIL, THUMBNAIL)
    arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(arrays)).flatten(1)


def _scaled(small: Tensor) -> Tensor:
    """Return thumbnails as vectors whose Euclidean distance is the root mean square difference of pixels in [0, 1]."""
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


def pixel_neighbours(
    small: Tensor, training: Tensor, neighbours: int = NEIGHBOURS, *, own_rows: Tensor | None = None
) -> Neighbours:
    """Search the nearest training images in pixels, with mirrored and moved views.

    Args:
        small, training: `thumbnails` of the images and of the training images, m 3072 and n 3072.
        own_rows: the row of each image if the images are training images; it is not compared with itself.
    """
    found: Neighbours | None = None
    for view in views(small):
        blocks = (_scaled(block) for block in training.split(BLOCK))
        there = nearest_neighbours(_scaled(view), blocks, neighbours + (own_rows is not None))
        there = there if own_rows is None else there.without(own_rows)
        found = there if found is None else found.nearer(there)
    assert found is not None
    return found


def calibrated_threshold(
    ratios: Tensor, rate: float = FALSE_POSITIVE_RATE, *, mutual: bool = False
) -> tuple[float, float]:
    """Return the threshold for ratios below which an image counts as a copy, and its false-positive rate.

    Args:
        ratios: ratios of real images that are known not to be copies, h
        rate: the intended rate; with few images the lowest possible is 1 / (h + 1).
        mutual: whether the images were compared with each other, so that the smallest ratios come in pairs: two images
            that are each other's nearest have one distance between them, and count once.

    Returns:
        The k-th smallest ratio, with k = max(1, floor(rate · (h + 1))), and the rate k / (h + 1), which is exact in the
        mean over sets of real images if generated images that are not copies are distributed like them.
    """
    size, of_one = (len(ratios) // 2, 2) if mutual else (len(ratios), 1)
    k = max(1, math.floor(rate * (size + 1)))
    place = min(k * of_one - (of_one - 1), len(ratios))
    return float(ratios.kthvalue(place).values), k / (size + 1)


def wilson_interval(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion (Wilson 1927)."""
    share, spread = count / total, z * z / total
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


@dataclass(frozen=True)
class CopyReport:
    """The verdict on a set of generated images in one space.

    Attributes:
        space: what was compared: pixels, latents or features.
        calibrated_on: the images that the threshold was set with.
        false_positive_rate: fraction of other images that are called copies all the same.
        copies, exact_copies: numbers of copies; exact ones are included in `copies`.
        copy_rate, lowest_rate, highest_rate: fraction of copies with its 95 % confidence interval.
    """

    space: str
    num_images: int
    num_training: int
    num_held_out: int
    calibrated_on: str
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


@dataclass(frozen=True)
class Similarity:
    """Generated images and their nearest training images in one space."""

    report: CopyReport
    neighbours: Neighbours

    @property
    def is_copy(self) -> Tensor:
        """m, bool"""
        return self.neighbours.ratios < self.report.threshold

    def closest(self, count: int) -> list[int]:
        """Return the generated images with the lowest ratios, the closest first."""
        return self.neighbours.ratios.argsort()[:count].tolist()


def judge(
    space: str, generated: Neighbours, real: Neighbours, num_training: int, *, calibrated_on: str, exact_below: float
) -> Similarity:
    """Judge generated images by the ratios of real ones.

    Args:
        real: neighbours of real images, with which the threshold is set.
        exact_below: distance below which a copy counts as exact.
    """
    threshold, rate = calibrated_threshold(real.ratios, mutual=calibrated_on == AMONG_THEMSELVES)
    copied = generated.ratios < threshold
    copies, total = int(copied.sum()), len(copied)
    lowest, highest = wilson_interval(copies, total)
    exact = int((copied & (generated.distances[:, 0] < exact_below)).sum())
    report = CopyReport(
        space,
        total,
        num_training,
        len(real.rows),
        calibrated_on,
        threshold,
        rate,
        copies,
        exact,
        copies / total,
        lowest,
        highest,
    )
    return Similarity(report, generated)


def compare_pixels(samples: Tensor, training: Tensor, held_out: Tensor | None = None) -> Similarity:
    """Compare images with all training images in pixels, with mirrored and moved views.

    Args:
        samples, training: `thumbnails` of generated and of training images, m 3072 and n 3072.
        held_out: thumbnails of real images that were not trained on, with which the threshold is set. With fewer than
            `FEWEST_HELD_OUT`, training images are compared with each other instead.
    """
    if held_out is not None and len(held_out) >= FEWEST_HELD_OUT:
        real, name = pixel_neighbours(held_out, training), "held-out images"
    else:
        rows = _calibration_rows(training)
        real, name = pixel_neighbours(training[rows], training, own_rows=rows), AMONG_THEMSELVES
    found = pixel_neighbours(samples, training)
    return judge("pixels", found, real, len(training), calibrated_on=name, exact_below=EXACT)


def compare_vectors(space: str, samples: Tensor, training: Tensor, held_out: Tensor | None = None) -> Similarity:
    """Compare images with all training images by their latents or features; as `compare_pixels`, with m D and n D."""
    if held_out is not None and len(held_out) >= FEWEST_HELD_OUT:
        real, name = nearest_neighbours(held_out, training), "held-out images"
    else:
        rows = _calibration_rows(training)
        real = nearest_neighbours(training[rows], training, NEIGHBOURS + 1).without(rows)
        name = AMONG_THEMSELVES
    found = nearest_neighbours(samples, training)
    exact_below = 1e-3 * float(real.distances.mean())
    return judge(space, found, real, len(training), calibrated_on=name, exact_below=exact_below)


def _calibration_rows(training: Tensor) -> Tensor:
    return torch.linspace(0, len(training) - 1, min(len(training), MOST_CALIBRATION)).round().long()


def compute_sample_similarity(samples: Images, training_data: Images, held_out: Images | None = None) -> Similarity:
    """Search the nearest training image of each generated image, and judge whether it is a copy.

    Args:
        samples: generated images: a list of Pillow images, a tensor (m 3 H W in [-1, 1]), or an iterable over batches
            of either; batches may be dicts with `pixel_values`.
        training_data: the images that the model was trained on, in the same forms.
        held_out: images of the same kind that it was not trained on; they set the threshold.

    Raises:
        ValueError: fewer than 1 sample, or than 2 training images.
    """
    generated, training = _thumbnails_of(samples), _thumbnails_of(training_data)
    if not len(generated) or len(training) < 2:
        raise ValueError(f"{len(generated)} generated and {len(training)} training images; at least 1 and 2 are needed")
    return compare_pixels(generated, training, None if held_out is None else _thumbnails_of(held_out))


def check_memorization(
    model: Any,
    dataloader: Iterable[Mapping[str, Any]],
    num_generate: int = 1000,
    num_training: int = 10_000,
    *,
    held_out: Images | None = None,
    batch_size: int = 16,
    sampling: SamplingConfig | None = None,
) -> Similarity:
    """Generate images with a pipeline, and judge how many of them are copies of training images.

    Conditional models get the captions, labels or control images of the training data.

    Args:
        model: a pipeline of Halftone, or another one of Diffusers.
        dataloader: batches of training data: `pixel_values` (B 3 H W in [-1, 1]), and `caption`, `label` or
            `conditioning_pixel_values` for a model that needs them.
        num_generate: number of images to generate. With 1,000, a copy rate of 0.3 % differs from 0.
        num_training: maximum number of training images to compare with.
        held_out: real images that the model was not trained on; they set the threshold.

    Raises:
        UserError: the model needs something that the batches do not have.
    """
    generator = generator_of(model, sampling or SamplingConfig())
    training: list[Tensor] = []
    items: list[dict[str, Any]] = []
    for batch in dataloader:
        missing = [name for name in generator.needs if name not in batch]
        if missing:
            raise UserError(f"a {generator.kind} needs {', '.join(missing)}, which the batches do not have")
        some = _images(batch)
        training.append(thumbnails(some))
        if len(items) < num_generate:
            items += [{name: batch[name][i] for name in generator.needs} for i in range(len(some))]
        if sum(map(len, training)) >= num_training:
            break
    if not items:
        raise UserError("the dataloader has no batches")
    images: list[Image.Image] = []
    for start in range(0, num_generate, batch_size):
        numbers = range(start, min(start + batch_size, num_generate))
        images += generator([items[number % len(items)] for number in numbers], numbers)
    calibration = None if held_out is None else _thumbnails_of(held_out)
    return compare_pixels(thumbnails(images), torch.cat(training)[:num_training], calibration)


def verdict(reports: Iterable[CopyReport | Mapping[str, Any]], tolerance: float = TOLERANCE) -> str:
    """Return the verdict on a model in words, from its reports in all spaces."""
    known = [report if isinstance(report, CopyReport) else CopyReport(**report) for report in reports]
    if not known:
        return "not checked"
    worst = max(known, key=lambda report: report.lowest_rate - report.false_positive_rate)
    counted = (
        f"{worst.copies} of {worst.num_images:,} generated images ({worst.copy_rate:.1%}) are copies in {worst.space}, "
        f"where {worst.false_positive_rate:.1%} are expected of a model that does not copy"
    )
    enough = worst.num_images >= FEWEST_FOR_VERDICT
    if worst.exceeds(tolerance):
        says = "the model copies its training images" if enough else "there are signs of copied training images"
    else:
        says = "no copied training images were found" if enough else "no sign of copied training images so far"
    return f"{says}: {counted}" + ("" if enough else f"; a verdict needs {FEWEST_FOR_VERDICT:,} images")


def contact_sheet(
    similarity: Similarity,
    generated: Sequence[Image.Image],
    training_image: Callable[[int], Image.Image],
    count: int = SHEET_PAIRS,
) -> Image.Image:
    """Draw the closest pairs: each generated image beside its nearest training image, the closest pair first."""
    rows, titles = [], []
    for number in similarity.closest(count):
        row = int(similarity.neighbours.rows[number, 0])
        rows.append([generated[number], training_image(row)])
        ratio = float(similarity.neighbours.ratios[number])
        copied = "copy" if bool(similarity.is_copy[number]) else "no copy"
        titles.append(f"ratio {ratio:.2f}: {copied} (training image {row})")
    return comparison_grid(rows, ["generated", "nearest training image"], row_titles=titles)


def _thumbnails_of(images: Images) -> Tensor:
    parts = [thumbnails(batch) for batch in _batches(images) if batch]
    return torch.cat(parts) if parts else torch.zeros(0, 3 * THUMBNAIL * THUMBNAIL, dtype=torch.uint8)


def _batches(images: Images) -> Iterator[list[Image.Image]]:
    if isinstance(images, Tensor):
        yield _images(images)
    elif isinstance(images, Sequence) and images and isinstance(images[0], Image.Image):
        yield list(images)
    else:
        for batch in images:
            yield _images(batch)


def _images(batch: Any) -> list[Image.Image]:
    if isinstance(batch, Mapping):
        batch = batch["pixel_values"]
    return [to_pil(image) for image in batch] if isinstance(batch, Tensor) else list(batch)
