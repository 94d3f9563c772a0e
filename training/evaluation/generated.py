"""Measurements of generated images against real ones: distances with their floor, and colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from pipelines.common.pixels import to_rgb
from pipelines.tools.cli import UserError, located
from pipelines.tools.files import image_suffixes, read_image
from pipelines.tools.progress import Progress
from training.core.exchange import Exchange
from training.core.options import Options, option
from training.evaluation.data import EvaluationData, RealImages
from training.metrics.colors import color_difference, color_statistics, reduced
from training.metrics.distances import diversity
from training.metrics.features import CHUNK, DEFAULT_EXTRACTOR, FeatureExtractor
from training.metrics.generators import ImageGenerator
from training.metrics.quality import measure_distances, measure_floor

COLOR_IMAGES = 512

T = TypeVar("T")


@dataclass
class QualityConfig(Options):
    """What is measured of generated images."""

    num_images: int = option(1000, at_least=4, essential=True)
    """Number of images to generate"""
    batch_size: int = option(16, at_least=1)
    """Number of images generated at a time; it changes the memory and the speed, not the metrics"""
    extractor: str = option(DEFAULT_EXTRACTOR)
    """Network whose features are compared: efficientnet-lite0, whose weights are installed with Halftone, or the Hub id
    or folder of a vision model of Transformers, such as facebook/dinov2-small, or a TorchScript file (.pt) of Inception
    that takes images from 0 to 255"""
    extractor_resolution: int | None = option(None, at_least=32)
    """Width and height to which images are resized for the extractor; if unset, that of the extractor"""


def generate(
    generator: ImageGenerator, data: EvaluationData, config: QualityConfig, exchange: Exchange
) -> list[Image.Image]:
    """Generate `num_images` images, or one for each row if the images do not depend on a seed."""
    count = config.num_images if generator.samples else min(config.num_images, len(data.conditions))
    return map_shown(
        exchange, lambda numbers: generator(data.items(numbers), numbers), count, config.batch_size, "generated"
    )


def map_shown(
    exchange: Exchange, function: Callable[[Sequence[int]], Sequence[T]], count: int, batch_size: int, title: str
) -> list[T]:
    """Return `exchange.map(function, count, batch_size)`, while the main process shows the progress of its images."""
    own = sum(map(len, exchange.share(count, batch_size)))
    with Progress(own, "image", title, shown=exchange.is_main) as progress:

        def shown(numbers: Sequence[int]) -> Sequence[T]:
            results = function(numbers)
            progress.update(len(numbers))
            return results

        return exchange.map(shown, count, batch_size)


def images_in(folder: str, at_most: int) -> list[Image.Image]:
    """Return the images in a folder, in the order of their names.

    Raises:
        UserError: it has fewer than 4 images, or one of them cannot be read.
    """
    path = Path(folder).expanduser()
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in image_suffixes()) if path.is_dir() else []
    if len(files) < 4:
        raise UserError(
            f"--images {located(folder)}: {len(files)} images were found there; give a folder with at least 4"
        )
    return [to_rgb(read_image(file)) for file in files[:at_most]]


def measure(
    images: Sequence[Image.Image], splits: Mapping[str, RealImages], extractor: FeatureExtractor, exchange: Exchange
) -> dict[str, Any]:
    """Compare images with all images of `splits`; every process calls it, and all get the result."""
    own = exchange.map_batches(lambda numbers: extractor([images[i] for i in numbers]), len(images), CHUNK)
    real = torch.cat([split.features(extractor, exchange) for split in splits.values()])
    floor = measure_floor(real, len(images), exchange=exchange)
    shown = [image for split in splits.values() for image in _some(split, COLOR_IMAGES // len(splits), exchange)]
    return exchange.on_main(lambda: _compared(images, torch.cat(own), shown, real) | {"floor": floor})


def _compared(
    images: Sequence[Image.Image], features: Tensor, shown: Sequence[Image.Image], real: Tensor
) -> dict[str, Any]:
    distances = measure_distances(real, features)
    colors = {**color_statistics(images), "color_difference": color_difference(images, shown)}
    return {
        "metrics": {**distances.values, **colors},
        "refused": distances.refused,
        "real": {"images": len(real), "diversity": diversity(real), **color_statistics(shown)},
    }


def _some(split: RealImages, at_most: int, exchange: Exchange) -> list[Image.Image]:
    """Return images that are evenly spaced in a split, each in the size in which its colours are measured."""
    some = RealImages(split.name, split.data, at_most)
    return exchange.map(lambda places: [reduced(image) for image in some.images(places)], len(some), CHUNK)
