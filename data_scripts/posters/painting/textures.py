"""What `standard` posters have and `plain` ones do not: graded colours, shadows, the marks of print and scan; and what
`rich` ones have besides: the noise of a JPEG file."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

from data_scripts.posters.brief import pick

Color = tuple[int, int, int]

GRADE = 0.16
"""How far a graded colour goes towards black at one corner and white at the other."""
GRAIN, FIBRE = 5.0, 2.0
"""Standard deviations, in 0..255, of the grain (pixel by pixel) and of the paper's cloudiness (1/16 of the page)."""
DIMMEST, BRIGHTEST = 0.8, 1.1
"""How much of its light a place on the page may get."""
LIGHT_POINTS = 3
"""Along each side of the page; between them the light changes smoothly."""
MOST_BLUR = 0.8
"""Standard deviation of the blur (px of the finished poster)."""

JPEG_QUALITY = range(40, 91)
"""From a much-forwarded scan to a good one."""


def graded(color: Color, pixels: int, scale: int, rng: np.random.Generator) -> Image.Image:
    """A square of `color`, `pixels` × `scale` along a side, lighter at one corner and darker at another.

    The steps are `scale` px wide: one to a pixel of the finished poster, which is all that is left after averaging.
    """
    base = np.array(color, dtype=np.float64)
    darker, lighter = base * (1 - GRADE), base + (255 - base) * GRADE
    corners = np.stack([lighter, base, base, darker]).round().astype(np.uint8).reshape(2, 2, 3)
    turned = Image.fromarray(np.rot90(corners, pick(rng, (0, 1, 2, 3))).copy())
    smooth = turned.resize((pixels, pixels), Image.Resampling.BILINEAR)
    return smooth.resize((pixels * scale, pixels * scale), Image.Resampling.NEAREST)


def printed_and_scanned(poster: Image.Image, rng: np.random.Generator, scan: np.random.Generator) -> Image.Image:
    """The poster a little out of focus, under uneven light, on paper: grain is alike in all three channels.

    Args:
        rng: for the paper.
        scan: for focus and light, which are the same at every resolution.
    """
    size = poster.width
    blurred = poster.filter(ImageFilter.GaussianBlur(MOST_BLUR * scan.random()))
    light = np.clip(_smooth(scan.uniform(DIMMEST, BRIGHTEST, (LIGHT_POINTS,) * 2), size), DIMMEST, BRIGHTEST)
    clouds = _smooth(rng.standard_normal((16, 16)), size)
    uneven = GRAIN * rng.standard_normal((size, size), dtype=np.float32) + FIBRE * clouds
    pixels = np.asarray(blurred, dtype=np.float32) * light[..., None] + uneven[..., None]
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))


def _smooth(points: np.ndarray, size: int) -> np.ndarray:
    """A few values spread over `size` × `size` px, as float32."""
    return np.asarray(Image.fromarray(points.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))


def with_jpeg_noise(poster: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The poster as it comes back from a JPEG file of some quality, colours at half resolution as is usual."""
    file = io.BytesIO()
    poster.save(file, format="JPEG", quality=pick(rng, JPEG_QUALITY), subsampling="4:2:0")
    with Image.open(file) as stored:
        return stored.convert("RGB")


def cast_shadow(page: Image.Image, box: tuple[int, int, int, int], offset: int) -> None:
    """Darken `page` where a sheet at `box` (px), lit from the upper left, throws its shadow."""
    x0, y0, x1, y1 = box
    for step in (1.0, 0.6):  # two overlapping steps read as a soft edge
        shift = round(offset * step)
        area = (x0 + shift, y0 + shift, min(x1 + shift, page.width), min(y1 + shift, page.height))
        page.paste(page.crop(area).point(lambda value: value * 4 // 5), area)
