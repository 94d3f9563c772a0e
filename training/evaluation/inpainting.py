"""How well a model fills parts of real images: the boundary error, and KID of what was filled.

n images, H W pixels, D features. A rectangle is (left, top, right, bottom) in pixels, without the last two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pipelines.common.pixels import to_rgb
from pipelines.tools.cli import UserError
from training.core.exchange import ALONE, Exchange
from training.core.options import Options, option
from training.evaluation.data import EvaluationData
from training.evaluation.generated import map_shown
from training.metrics.distances import kernel_distance
from training.metrics.features import CHUNK, FeatureExtractor
from training.metrics.generators import ImageGenerator
from training.metrics.images import to_pil

LEAST_SHARE, LARGEST_SHARE = 0.25, 0.5
LARGEST_ASPECT_RATIO = 2.0
Rectangle = tuple[int, int, int, int]


@dataclass
class InpaintingConfig(Options):
    """Whether and how parts of real images are filled."""

    inpaint_images: int = option(0, at_least=0)
    """Number of real images of --split (4 or more) of which the model fills a random rectangle, 25 to 50 % of the area,
    to measure how well the filled part fits; 0 for no such measurement"""
    jump_n_sample: int = option(1, at_least=1)
    """How many times each step is taken while a part is filled, see sample.py; more may fit better and takes longer"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if 0 < self.inpaint_images < 4:
            raise UserError(f"--inpaint_images must be 0 or at least 4, but is {self.inpaint_images}")

    def check_filling(self, generator: ImageGenerator | None) -> None:
        """Raise a UserError if parts are to be filled, and the model (None for a folder of images) cannot do it."""
        if self.inpaint_images and (generator is None or not generator.fills):
            what = "a folder of images" if generator is None else f"this {generator.kind}"
            raise UserError(f"--inpaint_images: {what} cannot fill a part of an image; leave it out")


def measure_inpainting(
    generator: ImageGenerator,
    images: Sequence[Image.Image],
    data: EvaluationData,
    extractor: FeatureExtractor,
    config: InpaintingConfig,
    batch_size: int,
    exchange: Exchange = ALONE,
    poll: Callable[[], None] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Let the model fill a rectangle of each real image, and compare it with two baselines and with the real images.

    Every process calls it, fills its share of the images, and gets the result.

    The baselines fill with the mean colour of the rest (`…_mean_colour`), and with the same part of an image that was
    generated for another row (`…_pasted`). The reference of KID are the same parts of other real images.

    Args:
        images: images that the model generated, in the order of the rows of `data`.

    Returns:
        The metrics, and what the real images reach (`inpaint_boundary_error`, `inpaint_kid`).
    """
    count = config.inpaint_images

    def fill(numbers: Sequence[int]) -> list[tuple[Image.Image, Image.Image]]:
        items = data.items(numbers)
        originals = [to_pil(item["pixel_values"]) for item in items]
        own = _rectangles(originals, numbers[0])
        masks = [mask_of(rectangle, image.size) for rectangle, image in zip(own, originals)]
        made = generator.fill(items, numbers, originals, masks, config.jump_n_sample, poll)
        return [(one, image.resize(one.size)) for image, one in zip(made, originals)]  # with another --resolution

    def features(some: Sequence[Image.Image]) -> Tensor:
        parts = [image.crop(one) for image, one in zip(some, rectangles)]
        return torch.cat(exchange.map_batches(lambda numbers: extractor([parts[n] for n in numbers]), count, CHUNK))

    real, filled = zip(*map_shown(exchange, fill, count, batch_size, "filled"), strict=True)
    rectangles = _rectangles(real)
    pasted = [images[(number + 1) % len(images)] for number in range(count)]
    shown = {
        "": filled,
        "_mean_colour": [_with_mean_colour(*pair) for pair in zip(real, rectangles)],
        "_pasted": [_with_part_of(*parts) for parts in zip(real, pasted, rectangles)],
        "_real": real,
    }
    reference = features(_other_images(data, real))
    metrics: dict[str, float] = {}
    for name, some in shown.items():
        metrics[f"inpaint_boundary_error{name}"] = boundary_error(some, rectangles)
        kid = kernel_distance(reference, features(some))
        metrics |= {f"inpaint_kid{name}": kid.value, f"inpaint_kid{name}_standard_error": kid.standard_error}
    reached = {name: metrics.pop(f"{name}_real") for name in ("inpaint_boundary_error", "inpaint_kid")}
    metrics.pop("inpaint_kid_real_standard_error")
    return metrics, reached


def random_rectangle(number: int, size: tuple[int, int]) -> Rectangle:
    """Return the rectangle to fill of image `number`, which depends on nothing else; `size` is (width, height).

    Its share of the area is uniform from 25 to 50 %, its aspect ratio log-uniform from 1:2 to 2:1, and its position
    uniform.
    """
    random = np.random.default_rng([number, 7])
    share = random.uniform(LEAST_SHARE, LARGEST_SHARE)
    ratio = math.exp(random.uniform(-1, 1) * math.log(LARGEST_ASPECT_RATIO))
    # A side is at most that of the image; the other one then has the length that the share needs.
    height_share = min(1.0, max(share, math.sqrt(share * ratio)))
    width, height = round(size[0] * share / height_share), round(size[1] * height_share)
    left, top = random.integers(size[0] - width + 1), random.integers(size[1] - height + 1)
    return int(left), int(top), int(left) + width, int(top) + height


def mask_of(rectangle: Rectangle, size: tuple[int, int]) -> Image.Image:
    """Return a grey image of (width, height) that is white in the rectangle and black elsewhere."""
    mask = Image.new("L", size)
    left, top, right, bottom = rectangle
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


def boundary_error(images: Sequence[Image.Image], rectangles: Sequence[Rectangle]) -> float:
    """Return the mean absolute difference of neighbouring pixels on both sides of the edge of the rectangle.

    Values are in [0, 1]. Sides at the border of the image have no neighbours. The mean is over images, colours and
    pairs of pixels; a seam raises it above that of real images, and a blurred edge lowers it.
    """
    means = []
    for image, rectangle in zip(images, rectangles):
        pixels = np.asarray(to_rgb(image), dtype=np.float64) / 255
        means.append(np.concatenate(list(_across_the_edge(pixels, rectangle))).mean())
    return float(np.mean(means))


def _across_the_edge(pixels: np.ndarray, rectangle: Rectangle) -> Iterator[np.ndarray]:
    left, top, right, bottom = rectangle
    height, width = pixels.shape[:2]
    for inside, outside, end in ((left, left - 1, width), (right - 1, right, width)):
        if 0 <= outside < end:
            yield np.abs(pixels[top:bottom, inside] - pixels[top:bottom, outside])
    for inside, outside, end in ((top, top - 1, height), (bottom - 1, bottom, height)):
        if 0 <= outside < end:
            yield np.abs(pixels[inside, left:right] - pixels[outside, left:right])


def _rectangles(images: Sequence[Image.Image], start: int = 0) -> list[Rectangle]:
    return [random_rectangle(number, image.size) for number, image in enumerate(images, start=start)]


def _with_mean_colour(image: Image.Image, rectangle: Rectangle) -> Image.Image:
    pixels = np.array(to_rgb(image))
    outside = np.asarray(mask_of(rectangle, image.size)) == 0
    pixels[~outside] = pixels[outside].mean(axis=0).round()
    return Image.fromarray(pixels)


def _with_part_of(image: Image.Image, other: Image.Image, rectangle: Rectangle) -> Image.Image:
    filled = to_rgb(image).copy()
    filled.paste(to_rgb(other).resize(image.size).crop(rectangle), rectangle[:2])
    return filled


def _other_images(data: EvaluationData, real: Sequence[Image.Image]) -> list[Image.Image]:
    """Return as many other real images: those of the training data, or the same ones in another order without them."""
    if data.training is None:
        return [*real[1:], real[0]]
    places = list(itertools.islice(itertools.cycle(data.training.spread(len(real))), len(real)))
    return [image.resize(own.size) for image, own in zip(data.training.images(places), real)]
