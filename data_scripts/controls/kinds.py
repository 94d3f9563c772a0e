"""Control images drawn from pictures: edges, soft edges, palettes, and masks read by a layout encoder.

H W pixels of a picture, K colours.
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
    "soft_edges": "how strong an edge is, in grey (gradient magnitude)",
    "palette": "the picture's few colours, in coarse cells",
    "layout": "where text and pictures are, as a layout encoder reads it",
}
LAYOUT_MASKS = ("text_mask", "image_mask")


def require_scikit_image(kinds: Sequence[str]) -> None:
    """Raises UserError where edges are wanted and scikit-image is not installed."""
    try:
        import skimage  # noqa: F401
    except ImportError:
        wanted = [kind for kind in kinds if kind in ("edges", "soft_edges")]
        if wanted:
            raise UserError(
                f"--kind {wanted[0]} needs scikit-image, which is not installed: "
                f"{install_command('controls', 'scikit-image')}"
            ) from None


def edges(picture: Image.Image, sigma: float, low: float, high: float) -> Image.Image:
    """Canny's edges of any of the three colours, one or two pixels wide; 8-bit grey, 0 or 255, H × W.

    Edges of the brightness alone would miss those between colours of one brightness. An edge between two pixels is as
    steep at either, and both are marked.

    Args:
        picture: RGB.
        sigma: of the Gaussian blur before, in pixels.
        low, high: gradients, as shares of what an edge from none to all of a colour has without a blur: above `high`
            is an edge, and above `low` what hangs together with one.
    """
    from skimage.feature import canny

    # Its Sobel filter gives 4 for an edge from 0 to 1. Nothing outside the picture is an edge.
    thresholds = {"low_threshold": 4 * low, "high_threshold": 4 * high}
    colors = np.moveaxis(np.asarray(picture, dtype=np.float64) / 255, 2, 0)
    found = np.any([canny(color, sigma=sigma, mode="nearest", **thresholds) for color in colors], axis=0)
    return Image.fromarray(found.astype(np.uint8) * 255)


def soft_edges(picture: Image.Image, sigma: float) -> Image.Image:
    """The gradient's magnitude after a Gaussian blur, strongest of the three colours; 8-bit grey, H × W.

    255 is an edge from none to all of a colour; the square root between makes faint edges visible.

    Args:
        picture: RGB.
        sigma: of the blur, in pixels.
    """
    gradients = _gradients(np.asarray(picture, dtype=np.float64) / 255, sigma) / _steepest(sigma)
    return Image.fromarray((np.sqrt(gradients.max(2).clip(0, 1)) * 255).round().astype(np.uint8))


def palette(picture: Image.Image, colors: int, cells: int) -> Image.Image:
    """The picture in at most `colors` colours, each cell in the one that most of it has; RGB, H × W.

    Args:
        picture: RGB.
        colors: K, found by median cut and k-means.
        cells: along the shorter side; the longer has as many more as keep them square.
    """
    reduced = picture.quantize(colors, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    table = np.array(reduced.getpalette(), dtype=np.uint8).reshape(-1, 3)
    ids, shorter = np.asarray(reduced), min(picture.size)
    width, height = picture.size
    across, down = (max(1, round(min(cells, shorter) * side / shorter)) for side in (width, height))
    cell_y, cell_x = np.arange(height) * down // height, np.arange(width) * across // width
    places = (cell_y[:, None] * across + cell_x) * len(table) + ids
    counts = np.bincount(places.ravel(), minlength=down * across * len(table)).reshape(down, across, len(table))
    return Image.fromarray(table[counts.argmax(2)[cell_y][:, cell_x]])


def layout_masks(pipeline: Any, picture: Image.Image) -> list[Image.Image]:
    """`LAYOUT_MASKS` as `pipeline` (LayoutAnalysisPipeline) reads them: 8-bit grey, 0 or 255, H × W."""
    features = pipeline(picture, overlays=False).features[0]
    return [Image.fromarray((mask > 0.5).astype(np.uint8) * 255) for mask in features[:2]]


def _gradients(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Sobel's gradient magnitude of each channel after a blur, H W C."""
    from skimage.filters import gaussian, sobel

    blurred = gaussian(pixels, sigma=sigma, mode="nearest", channel_axis=-1)
    return np.stack([sobel(blurred[..., c], mode="nearest") for c in range(pixels.shape[2])], axis=-1)


@functools.lru_cache(maxsize=8)
def _steepest(sigma: float) -> float:
    """The magnitude at an upright edge from 0 to 1."""
    side = 8 + 8 * int(np.ceil(sigma))
    step = np.zeros((side, side, 1))
    step[:, side // 2 :] = 1
    return float(_gradients(step, sigma).max())
