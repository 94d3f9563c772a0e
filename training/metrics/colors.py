"""Colours of sets of images: how light, how colourful and how varied they are, and how far two sets are apart.

Values are CIE L*a*b* (D65): L* from 0 (black) to 100 (white); a* and b* about from -100 to 100, 0 for grey.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from pipelines.common.pixels import to_rgb

QUANTILES = np.linspace(0.005, 0.995, 100)
PIXELS = 32
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(axis=1)


def reduced(image: Image.Image) -> Image.Image:
    """Return an image as RGB at 32 × 32 pixels, of which all functions below return the same as of the image itself."""
    return to_rgb(image).resize((PIXELS, PIXELS), Image.Resampling.BOX)


def lab(image: Image.Image) -> np.ndarray:
    """Return the L*a*b* values of an sRGB image, reduced to 32 × 32 pixels: 1024 × 3 (IEC 61966-2-1, CIE 15)."""
    encoded = np.asarray(reduced(image), dtype=np.float64).reshape(-1, 3) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def color_statistics(images: Iterable[Image.Image]) -> dict[str, float]:
    """Return the mean lightness (L*), chroma (√(a*² + b*²)) and contrast (standard deviation of L* within an image)."""
    values = np.stack([lab(image) for image in images])
    chroma = np.hypot(values[..., 1], values[..., 2])
    return {
        "lightness": float(values[..., 0].mean()),
        "chroma": float(chroma.mean()),
        "contrast": float(values[..., 0].std(axis=1).mean()),
    }


def color_difference(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """Return the mean over L*, a* and b* of the Wasserstein-1 distance between the colours of two sets of images.

    It is 0 for equal distributions of colours. The unit is that of L*a*b*: a difference of about 2 in one colour is
    just visible.
    """
    distributions = [np.concatenate([lab(image) for image in some]) for some in (images, references)]
    ours, theirs = (np.quantile(values, QUANTILES, axis=0) for values in distributions)
    return float(np.abs(ours - theirs).mean())
