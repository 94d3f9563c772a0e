"""Control images drawn from images: edges, soft edges, palettes, and masks predicted by a layout encoder.

H W pixels of an image, K colours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipelines.tools.cli import UserError
from pipelines.tools.commands import install_command

KINDS = {
    "edges": "white lines where colour changes (Canny 1986)",
    "soft_edges": "the strength of edges in grey (gradient magnitude)",
    "palette": "the main colours of the image, in coarse cells",
    "layout": "where text and pictures are, as predicted by a layout encoder",
}
LAYOUT_MASKS = ("text_mask", "image_mask")


def require_scikit_image(kinds: Sequence[str]) -> None:
    """Raise UserError if one of the kinds needs scikit-image and it is not installed."""
    try:
        import skimage  # noqa: F401
    except ImportError:
        affected = [kind for kind in kinds if kind in ("edges", "soft_edges")]
        if affected:
            raise UserError(
                f"--kind {affected[0]} needs scikit-image, which is not installed: "
                f"{install_command('controls', 'scikit-image')}"
            ) from None


def edges(image: Image.Image, sigma: float, low: float, high: float) -> Image.Image:
    """Return the Canny edges of all three colour channels, one or two pixels wide: 8-bit grey, 0 or 255, H × W.

    Edges of the brightness alone would miss those between colours of equal brightness. A step between two pixels has
    the same gradient at both, so both are marked.

    Args:
        image: RGB.
        sigma: standard deviation of the Gaussian blur before edge detection, in pixels.
        low, high: thresholds of the gradient, as fractions of the gradient of an unblurred step over the full range of
            a channel. Pixels above `high` are edges, and so are pixels above `low` that are connected to them.
    """
    from skimage.feature import canny

    # The Sobel filter of `canny` gives 4 for a step from 0 to 1. With mode "nearest" the border is not an edge.
    thresholds = {"low_threshold": 4 * low, "high_threshold": 4 * high}
    colors = np.moveaxis(np.asarray(image, dtype=np.float64) / 255, 2, 0)
    marked = np.any([canny(color, sigma=sigma, mode="nearest", **thresholds) for color in colors], axis=0)
    return Image.fromarray(marked.astype(np.uint8) * 255)


def soft_edges(image: Image.Image, sigma: float) -> Image.Image:
    """Return the gradient magnitude after a Gaussian blur, the maximum over the channels: 8-bit grey, H × W.

    255 is a step over the full range of a channel. The square root of the magnitude makes faint edges visible.

    Args:
        image: RGB.
        sigma: standard deviation of the blur, in pixels.
    """
    gradients = _gradients(np.asarray(image, dtype=np.float64) / 255, sigma) / _steepest(sigma)
    return Image.fromarray((np.sqrt(gradients.max(2).clip(0, 1)) * 255).round().astype(np.uint8))


def palette(image: Image.Image, colors: int, cells: int) -> Image.Image:
    """Return the image in at most `colors` colours, each cell in its most frequent colour: RGB, H × W.

    Args:
        image: RGB.
        colors: maximum number K of colours, which are chosen by median cut and k-means.
        cells: number of cells along the shorter side; the longer side has more, so that cells are about square.
    """
    reduced = image.quantize(colors, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    table = np.array(reduced.getpalette(), dtype=np.uint8).reshape(-1, 3)
    ids, shorter = np.asarray(reduced), min(image.size)
    width, height = image.size
    across, down = (max(1, round(min(cells, shorter) * side / shorter)) for side in (width, height))
    cell_y, cell_x = np.arange(height) * down // height, np.arange(width) * across // width
    places = (cell_y[:, None] * across + cell_x) * len(table) + ids
    counts = np.bincount(places.ravel(), minlength=down * across * len(table)).reshape(down, across, len(table))
    return Image.fromarray(table[counts.argmax(2)[cell_y][:, cell_x]])


def layout_masks(pipeline: Any, image: Image.Image) -> list[Image.Image]:
    """Return `LAYOUT_MASKS` as predicted by `pipeline` (LayoutAnalysisPipeline): 8-bit grey, 0 or 255, H × W."""
    features = pipeline(image, overlays=False).features[0]
    return [Image.fromarray((mask > 0.5).astype(np.uint8) * 255) for mask in features[:2]]


def _gradients(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Return the Sobel gradient magnitude of each channel after a blur, H W C."""
    from skimage.filters import gaussian, sobel

    blurred = gaussian(pixels, sigma=sigma, mode="nearest", channel_axis=-1)
    return np.stack([sobel(blurred[..., c], mode="nearest") for c in range(pixels.shape[2])], axis=-1)


@functools.lru_cache(maxsize=8)
def _steepest(sigma: float) -> float:
    """Return the gradient magnitude at a vertical step from 0 to 1."""
    side = 8 + 8 * int(np.ceil(sigma))
    step = np.zeros((side, side, 1))
    step[:, side // 2 :] = 1
    return float(_gradients(step, sigma).max())
