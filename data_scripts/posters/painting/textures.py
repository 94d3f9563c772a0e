"""Textures of `standard` and `rich` posters: graded colours, shadows, traces of printing and scanning, and JPEG noise
(only for `rich` posters)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

from data_scripts.posters.brief import pick
from pipelines.tools.files import open_image_file

Color = tuple[int, int, int]

GRADE = 0.16
"""Fraction by which a graded colour approaches black in one corner and white in the opposite one."""
GRAIN, FIBRE = 5.0, 2.0
"""Standard deviations (0..255) of the grain of each pixel, and of smooth clouds in the paper, 1/16 of the page wide."""
DIMMEST, BRIGHTEST = 0.8, 1.1
"""Range of the factor by which uneven light changes the brightness of the page."""
LIGHT_POINTS = 3
"""Number of random light values along each side of the page; the light is interpolated between them."""
MOST_BLUR = 0.8
"""Maximum standard deviation of the blur (px of the finished poster)."""

JPEG_QUALITY = range(40, 91)
"""Qualities from a scan that was saved many times to a good one."""


def graded(color: Color, pixels: int, scale: int, rng: np.random.Generator) -> Image.Image:
    """Return a square of `color`, `pixels` × `scale` along a side, lighter in one corner, darker in the opposite one.

    The gradient has steps of `scale` px, one for each pixel of the finished poster: averaging would remove finer ones.
    """
    base = np.array(color, dtype=np.float64)
    darker, lighter = base * (1 - GRADE), base + (255 - base) * GRADE
    corners = np.stack([lighter, base, base, darker]).round().astype(np.uint8).reshape(2, 2, 3)
    turned = Image.fromarray(np.rot90(corners, pick(rng, (0, 1, 2, 3))).copy())
    smooth = turned.resize((pixels, pixels), Image.Resampling.BILINEAR)
    return smooth.resize((pixels * scale, pixels * scale), Image.Resampling.NEAREST)


def printed_and_scanned(poster: Image.Image, rng: np.random.Generator, scan: np.random.Generator) -> Image.Image:
    """Blur the poster slightly and add uneven light and the grain of paper, which is equal in all three channels.

    Args:
        poster: RGB.
        rng: generator for the paper.
        scan: generator for blur and light, which are the same at every resolution.
    """
    size = poster.width
    blurred = poster.filter(ImageFilter.GaussianBlur(MOST_BLUR * scan.random()))
    light = np.clip(_smooth(scan.uniform(DIMMEST, BRIGHTEST, (LIGHT_POINTS,) * 2), size), DIMMEST, BRIGHTEST)
    clouds = _smooth(rng.standard_normal((16, 16)), size)
    uneven = GRAIN * rng.standard_normal((size, size), dtype=np.float32) + FIBRE * clouds
    pixels = np.asarray(blurred, dtype=np.float32) * light[..., None] + uneven[..., None]
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))


def _smooth(points: np.ndarray, size: int) -> np.ndarray:
    """Interpolate a few values to `size` × `size` px, as float32."""
    return np.asarray(Image.fromarray(points.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))


def with_jpeg_noise(poster: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the poster after JPEG compression of random quality, with the usual half resolution of colours."""
    file = io.BytesIO()
    poster.save(file, format="JPEG", quality=pick(rng, JPEG_QUALITY), subsampling="4:2:0")
    with open_image_file(file) as stored:
        return stored.convert("RGB")


def cast_shadow(page: Image.Image, box: tuple[int, int, int, int], offset: int) -> None:
    """Darken `page` where a sheet at `box` (px), lit from the upper left, casts its shadow."""
    x0, y0, x1, y1 = box
    for step in (1.0, 0.6):  # two overlapping steps look like a soft edge
        shift = round(offset * step)
        area = (x0 + shift, y0 + shift, min(x1 + shift, page.width), min(y1 + shift, page.height))
        page.paste(page.crop(area).point(lambda value: value * 4 // 5), area)
