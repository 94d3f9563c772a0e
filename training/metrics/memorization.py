"""Memorization: whether a model returns its training images instead of new ones.

A generated image is compared with all training images, in pixels, in latents or in features of a network.
Near in absolute terms is not enough: images of a plain collection are all near each other. The test is therefore that
of Carlini et al. 2023 (arXiv:2301.13188, section 5.1): the distance to the nearest training image, divided by the mean
distance to the nearest 50. Held-out real images give the distribution of this ratio if nothing is copied, and from it
the threshold, so that the rate of false positives is known. Real images that are also among the training images
say nothing about this, and are left out.

m generated images, n training images, D values per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from pipelines.tools.cli import UserError
from pipelines.tools.grids import comparison_grid
from training.core.exchange import ALONE, Exchange
from training.metrics.generators import SamplingConfig, generator_of
from training.metrics.images import to_pil
from training.metrics.neighbours import THUMBNAIL, Neighbours, NeighbourSearch, pixel_search, thumbnails

FALSE_POSITIVE_RATE = 0.01
# Root mean square difference of pixel values in [0, 1] below which a copy is called exact: JPEG of high quality, or a
# round trip through a good autoencoder, changes an image by about as much.
EXACT = 0.02
# The same for latents and features, as a fraction of the mean distance of real images from their neighbours.
EXACT_VECTORS = 1e-3
# With fewer held-out images, the false-positive rate could not be as low as 1 %.
FEWEST_HELD_OUT = 99
MOST_CALIBRATION = 1000
AMONG_THEMSELVES = "training images, each compared with the others"
# Copies are reported as a fact if they exceed the false-positive rate by more than one percentage point.
TOLERANCE = 0.01
FEWEST_FOR_VERDICT = 1000
SHEET_PAIRS = 12

Images: TypeAlias = Tensor | Sequence[Image.Image] | Iterable[Any]


def calibrated_threshold(
    ratios: Tensor, rate: float = FALSE_POSITIVE_RATE, *, mutual: bool = False
) -> tuple[float, float]:
    """Return the threshold for ratios below which an image counts as a copy, and its false-positive rate.

    Args:
        ratios: ratios of real images that are known not to be copies, h; if there are none, every image counts as a
            copy, with a false-positive rate of 1.
        rate: the intended rate; with few images the lowest possible is 1 / (h + 1).
        mutual: whether the images were compared with each other, so that the smallest ratios come in pairs: two images
            that are each other's nearest have one distance between them, and count once.

    Returns:
        The k-th smallest ratio, with k = max(1, floor(rate · (h + 1))), and the rate k / (h + 1), which is exact in the
        mean over sets of real images if generated images that are not copies are distributed like them.
    """
    if not len(ratios):
        return 2.0, 1.0  # no ratio is above 1
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
        calibrated_on: the `num_held_out` real images that the threshold was set with.
        false_positive_rate: fraction of other images that are called copies all the same.
        copies, exact_copies: numbers of copies; exact ones are included in `copies`.
        copy_rate, lowest_rate, highest_rate: fraction of copies with its 95 % confidence interval.
        duplicates: number of further real images, which were left out because they are also training images.
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
    duplicates: int = 0

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
        """Return the generated images with the lowest ratios, the closest first, and one for each training image."""
        nearest: dict[int, int] = {}
        for number in self.neighbours.ratios.argsort().tolist():
            nearest.setdefault(int(self.neighbours.rows[number, 0]), number)
        return list(nearest.values())[:count]


class CopySearch:
    """Compares sets of generated images with all training images in one space, while the training images arrive.

    Several processes may divide the blocks of training images among them (`NeighbourSearch`). What returns a result is
    then called by all of them, with the same exchange.

    Args:
        space: pixels, latents or features; pixels are compared with mirrored and moved views.
        sets: generated images by the name of their set, each m D; `thumbnails` for pixels.
        real: real images, with which the threshold is set: h D, or their neighbours, which an earlier search has found.
        own_rows: the rows of `real` among the training images; None if they are held-out images.
    """

    def __init__(
        self, space: str, sets: Mapping[str, Tensor], real: Tensor | Neighbours, own_rows: Tensor | None = None
    ):
        self.space = space
        self._calibrated_on = "held-out images" if own_rows is None else AMONG_THEMSELVES
        self._real = self._search(real, own_rows) if isinstance(real, Tensor) else None
        self._neighbours_of_real = real if isinstance(real, Neighbours) else None
        self._sets = {name: self._search(vectors) for name, vectors in sets.items()}
        self._count = 0

    def _search(self, vectors: Tensor, own_rows: Tensor | None = None) -> NeighbourSearch:
        return pixel_search(vectors, own_rows) if self.space == "pixels" else NeighbourSearch([vectors], own_rows)

    def add(self, training: Tensor, first_row: int | None = None) -> None:
        """Add training images: ? D

        Args:
            first_row: the row of the first of them; None if they follow those that were added before.
        """
        for search in (self._real, *self._sets.values()):
            if search is not None:
                search.add(training, first_row)
        self._count += len(training)

    def neighbours_of_real(self, exchange: Exchange = ALONE) -> Neighbours:
        """Return the nearest training images of the real images, for another search among the same training images."""
        if self._neighbours_of_real is None:
            assert self._real is not None
            self._neighbours_of_real = self._real.result(exchange)
        return self._neighbours_of_real

    def duplicates(self, exchange: Exchange = ALONE) -> Tensor:
        """Return which real images are also among the training images; only for a search in pixels: h, bool"""
        return self.neighbours_of_real(exchange).distances[:, 0] < EXACT

    def results(self, duplicates: Tensor, exchange: Exchange = ALONE) -> dict[str, Similarity]:
        """Return the verdict on each set.

        Args:
            duplicates: the `duplicates` of the search in pixels.
        """
        real, num_training = self.neighbours_of_real(exchange), sum(exchange.gather(self._count))
        exact = EXACT if self.space == "pixels" else EXACT_VECTORS * float(real.distances.mean())
        ratios = real.ratios[~duplicates]
        threshold, rate = calibrated_threshold(ratios, mutual=self._calibrated_on == AMONG_THEMSELVES)
        found: dict[str, Similarity] = {}
        for name, search in self._sets.items():
            neighbours = search.result(exchange)
            copied = neighbours.ratios < threshold
            copies, total = int(copied.sum()), len(copied)
            lowest, highest = wilson_interval(copies, total)
            report = CopyReport(
                self.space,
                total,
                num_training,
                len(ratios),
                self._calibrated_on,
                threshold,
                rate,
                copies,
                int((copied & (neighbours.distances[:, 0] < exact)).sum()),
                copies / total,
                lowest,
                highest,
                len(real.rows) - len(ratios),
            )
            found[name] = Similarity(report, neighbours)
        return found


def compare_pixels(samples: Tensor, training: Tensor, held_out: Tensor | None = None) -> Similarity:
    """Compare images with all training images in pixels, with mirrored and moved views.

    Args:
        samples, training: `thumbnails` of generated and of training images, m 3072 and n 3072.
        held_out: thumbnails of real images that were not trained on, with which the threshold is set. With fewer than
            `FEWEST_HELD_OUT`, training images are compared with each other instead.
    """
    rows = None
    if held_out is None or len(held_out) < FEWEST_HELD_OUT:
        rows = calibration_rows(len(training))
        held_out = training[rows]
    search = CopySearch("pixels", {"": samples}, held_out, rows)
    search.add(training)
    return search.results(search.duplicates())[""]


def calibration_rows(num_training: int) -> Tensor:
    """Return the rows of the training images that are compared with the others where nothing is held out."""
    return torch.linspace(0, num_training - 1, min(num_training, MOST_CALIBRATION)).round().long()


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


@dataclass(frozen=True)
class ReplayReport:
    """What a model returns for the captions (briefs, control images) of its training images, in one space.

    Attributes:
        returned: number of captions for which it returned a copy of their own training image.
        nearest: number of captions whose own training image is the nearest one to what it returned.
        rate, lowest_rate, highest_rate: fraction of `returned` with its 95 % confidence interval.
        false_positive_rate: at most this fraction is counted by chance.
    """

    space: str
    num_images: int
    returned: int
    nearest: int
    rate: float
    lowest_rate: float
    highest_rate: float
    false_positive_rate: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def replay_report(similarity: Similarity, is_own: Tensor) -> ReplayReport:
    """Count the captions of training images for which a model returned a copy of their own image.

    Args:
        similarity: images that were generated from the captions of training images.
        is_own: whether the nearest training image of each is that of its caption: m, bool
    """
    report, total = similarity.report, len(is_own)
    returned = int((similarity.is_copy & is_own).sum())
    return ReplayReport(
        report.space,
        total,
        returned,
        int(is_own.sum()),
        returned / total,
        *wilson_interval(returned, total),
        report.false_positive_rate,
    )


def replay_verdict(reports: Sequence[ReplayReport], given: str = "captions") -> str:
    """Return in words what a model returns for the captions of its training images, from its reports in all spaces.

    Args:
        given: what the model was given: captions, briefs or control images.
    """
    worst = max(reports, key=lambda report: report.lowest_rate - report.false_positive_rate)
    return (
        f"given the {given} of {worst.num_images:,} training images, the model returned "
        f"{worst.returned} of these images ({worst.rate:.1%}) in {worst.space}; at most "
        f"{worst.false_positive_rate:.1%} by chance"
    )


def contact_sheet(
    similarity: Similarity,
    generated: Sequence[Image.Image],
    training_image: Callable[[int], Image.Image],
    count: int = SHEET_PAIRS,
) -> Image.Image:
    """Draw the closest pairs: a generated image beside its nearest training image, each training image once."""
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
