"""Metrics of how well posters follow their briefs, by image analysis alone; real posters show how well this works.

Legend: a poster is H × W × 3, uint8 RGB (NumPy, PIL or torch), square, and of a `plain` dataset. A brief is a row of
the posters' dataset (or a dict with its `palette`, `background`, `pictures` and `title_position`).

The reader works at 64 px (larger posters are averaged down first) and finds:
- pictures: patches of the cool monochrome in which `plain` pictures are printed, as large and as solid as a picture;
- the title: the eight consecutive rows whose pixels change most often between ink and background;
- the background: the colour name that is nearest to most pixels outside pictures.

The reader knows the palette of the brief, but not the positions. A poster is unreadable if less than half of its pixels
have a colour of the palette or of a picture; an unreadable poster counts as wrong for every brief.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.common.poster_domain import COLORS, PICTURE_TINT, TITLE_POSITIONS, color_distance, rgb_color
from training.core.exchange import ALONE, Exchange

Brief = Mapping[str, Any]

READING_PIXELS = 64
READ_AT_A_TIME = 16
PALETTE_DISTANCE = 40.0
"""Maximum RGB distance of a pixel from a colour of the palette"""

TONE_DISTANCE = 28.0
"""Maximum RGB distance of a pixel from the pictures' monochrome"""
TONE_RANGE = (56.0, 250.0)
SMALLEST_PICTURE = 10
"""Minimum width and height of a picture in pixels (the smallest picture of the generator has 14 inside its frame)"""
LEAST_FILL = 0.6
"""Minimum fraction of the pixels in a picture's box that have its tones"""

TITLE_ROWS = 8
INK_LINE_DISTANCE = 45.0
"""Maximum RGB distance of a letter's pixels, including its edges, from the line between background and ink colour"""
INK_FROM, INK_TO = 0.3, 0.6
"""Positions on that line from which a pixel counts as ink in part, and in full"""
LEAST_CROSSINGS = 3.0
"""Minimum number of changes between ink and background in a row of the title; partial changes count in part"""
CLEAR_LEAD = 1.25
"""Minimum ratio of the changes in the title's rows to those in any other rows"""


def reading_copy(image: Any) -> np.ndarray:
    """Return the poster as READING_PIXELS × READING_PIXELS × 3, float32, 0..255.

    Raises:
        ValueError: the poster is not a square RGB image whose side is a multiple of 64.
    """
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not is_legible(pixels.shape[:2]):
        raise ValueError(f"a poster is H × W × 3 with H = W = a multiple of {READING_PIXELS}; got shape {pixels.shape}")
    block = pixels.shape[0] // READING_PIXELS
    cells = pixels.astype(np.float32).reshape(READING_PIXELS, block, READING_PIXELS, block, 3)
    return cells.mean(axis=(1, 3))


def is_legible(size: tuple[int, int]) -> bool:
    """Return whether posters of this (width, height) can be read: squares whose side is a multiple of 64."""
    return size[0] == size[1] and size[0] % READING_PIXELS == 0


def find_pictures(image: Any) -> list[tuple[int, int, int, int]]:
    """Return the boxes (x0, y0, x1, y1; pixels of the 64 px copy, ends excluded) of the pictures in the poster."""
    pixels = reading_copy(image)
    solid = _dilated(_eroded(_has_picture_tone(pixels)))
    boxes = []
    for ys, xs in _components(solid):
        x0, y0, x1, y1 = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
        large = min(x1 - x0, y1 - y0) >= SMALLEST_PICTURE
        if large and len(xs) >= LEAST_FILL * (x1 - x0) * (y1 - y0):
            boxes.append((x0, y0, x1, y1))
    return sorted(boxes)


def is_readable(image: Any, brief: Brief) -> bool:
    """Return whether at least half of the pixels have a colour of the brief's palette or of a picture."""
    pixels = reading_copy(image)
    return bool((_near_palette(pixels, brief["palette"]) | _has_picture_tone(pixels)).mean() >= 0.5)


def count_pictures(image: Any, brief: Brief) -> int | None:
    """Return the number of pictures on the poster, or None if it is unreadable."""
    return len(find_pictures(image)) if is_readable(image, brief) else None


def read_title_position(image: Any, brief: Brief) -> str | None:
    """Return the third of the page with the title, 'top', 'middle' or 'bottom'; None if no title stands out."""
    if not is_readable(image, brief):
        return None
    crossings = _ink_crossings(image, brief)
    windows = np.convolve(crossings, np.ones(TITLE_ROWS) / TITLE_ROWS, mode="valid")
    best = int(windows.argmax())
    elsewhere = np.concatenate([windows[: max(best - TITLE_ROWS + 1, 0)], windows[best + TITLE_ROWS :]])
    if windows[best] < max(LEAST_CROSSINGS, CLEAR_LEAD * float(elsewhere.max())):
        return None
    center = (best + TITLE_ROWS / 2) / READING_PIXELS
    return TITLE_POSITIONS[min(int(3 * center), 2)]


def background_color_name(image: Any) -> str:
    """Return the name in COLORS that is nearest to most pixels outside the pictures."""
    pixels = reading_copy(image)[~_picture_mask(image)]
    table = np.array(list(COLORS.values()), dtype=np.float32)
    nearest = color_distance(pixels[:, None], table).argmin(axis=1)
    return list(COLORS)[int(np.bincount(nearest, minlength=len(COLORS)).argmax())]


def palette_share(image: Any, palette: Sequence[str]) -> float:
    """Return the fraction of pixels outside pictures within PALETTE_DISTANCE of a colour of `palette` (#rrggbb).

    Pictures are detected in real and in generated posters alike, so that only regions that look like pictures are left
    out.
    """
    outside = ~_picture_mask(image)
    return float(_near_palette(reading_copy(image), palette)[outside].mean()) if outside.any() else 0.0


def measure_posters(
    generated: Sequence[Any], briefs: Sequence[Brief], real: Sequence[Any], exchange: Exchange = ALONE
) -> dict[str, float]:
    """Compute how well generated posters follow their briefs, and the same for real posters of these briefs.

    Args:
        generated, real: N posters each, in the order of `briefs`.
        exchange: every process calls this function, reads its share of the posters, and gets the result.

    Returns:
        background_color_share: fraction of generated posters whose background colour is that of the brief.
        palette_share_ratio: mean fraction of pixels outside pictures that have a colour of the brief's palette, divided
            by the same mean for the real posters. (It is above 1 for a blank poster, so do not use it alone.)
        title_position_share: fraction of generated posters whose title is at the position in the brief.
        picture_count_share: fraction of generated posters with the number of pictures in the brief.
        reader_background_color_share_real, reader_title_position_share_real, reader_picture_count_share_real: the same
            for the real posters, which is what a perfect model would reach.
        <name>_standard_error: one standard error of each share (binomial, N posters) and of the ratio (over posters).

    Raises:
        ValueError: the three sequences have different lengths or are empty.
    """
    if not len(generated) == len(briefs) == len(real) > 0:
        raise ValueError(
            f"expected the same number (at least 1) of generated posters, briefs and real posters; got "
            f"{len(generated)}, {len(briefs)} and {len(real)}"
        )

    def read(numbers: Sequence[int]) -> list[list[float]]:
        return [[*_read(generated[n], briefs[n]), *_read(real[n], briefs[n])] for n in numbers]

    columns = np.array(exchange.map(read, len(briefs), READ_AT_A_TIME)).T
    generated_shares, real_shares = columns[3], columns[7]
    shares = {
        "background_color_share": float(columns[0].mean()),
        "title_position_share": float(columns[1].mean()),
        "picture_count_share": float(columns[2].mean()),
        "reader_background_color_share_real": float(columns[4].mean()),
        "reader_title_position_share_real": float(columns[5].mean()),
        "reader_picture_count_share_real": float(columns[6].mean()),
    }
    ratio = float(generated_shares.mean() / max(real_shares.mean(), 1e-9))
    errors = {f"{name}_standard_error": math.sqrt(share * (1 - share) / len(briefs)) for name, share in shares.items()}
    residuals = generated_shares - ratio * real_shares
    ratio_error = float(residuals.std() / max(real_shares.mean(), 1e-9) / math.sqrt(len(briefs)))
    return {**shares, "palette_share_ratio": ratio, **errors, "palette_share_ratio_standard_error": ratio_error}


def _read(image: Any, brief: Brief) -> list[float]:
    """Return whether background, title position and number of pictures are those of the brief, and `palette_share`."""
    return [
        background_color_name(image) == brief["background"],
        read_title_position(image, brief) == brief["title_position"],
        count_pictures(image, brief) == brief["pictures"],
        palette_share(image, brief["palette"]),
    ]


def _near_palette(pixels: np.ndarray, palette: Sequence[str]) -> np.ndarray:
    table = np.array([rgb_color(code) for code in palette], dtype=np.float32)
    return color_distance(pixels[..., None, :], table).min(axis=-1) <= PALETTE_DISTANCE


def _has_picture_tone(pixels: np.ndarray) -> np.ndarray:
    """Return which pixels are near the line tone × PICTURE_TINT."""
    tint = np.array(PICTURE_TINT, dtype=np.float32)
    tone = pixels @ tint / (tint @ tint)
    near = color_distance(pixels, np.minimum(tone[..., None] * tint, 255)) <= TONE_DISTANCE
    return near & (tone >= TONE_RANGE[0]) & (tone <= TONE_RANGE[1])


def _picture_mask(image: Any) -> np.ndarray:
    mask = np.zeros((READING_PIXELS, READING_PIXELS), dtype=bool)
    for x0, y0, x1, y1 in find_pictures(image):
        mask[y0:y1, x0:x1] = True
    return mask


def _ink_crossings(image: Any, brief: Brief) -> np.ndarray:
    """Count the changes between background and ink in each of the 64 rows, without pictures and their frames."""
    pixels = reading_copy(image)
    background = np.array(COLORS[brief["background"]], dtype=np.float32)
    ink = np.array(rgb_color(brief["palette"][-1]), dtype=np.float32)
    line = ink - background
    along = np.clip((pixels - background) @ line / (line @ line), 0, 1)
    off_line = color_distance(pixels, background + along[..., None] * line) > INK_LINE_DISTANCE
    # The blurred edge of a shape is near the background end of the line, so ink counts from a third of the line on.
    inkness = np.clip((along - INK_FROM) / (INK_TO - INK_FROM), 0, 1)
    # A shape's colour may be on the line (pink between red and cream), but a shape is not a letter.
    shapes = brief["palette"][1:-1]
    inkness[off_line | _near_palette(pixels, shapes)] = 0.0
    for x0, y0, x1, y1 in find_pictures(image):
        inkness[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = 0.0
    return np.abs(np.diff(inkness, axis=1)).sum(axis=1)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Return the pixels whose whole 3 × 3 neighbourhood is set (outside counts as not set)."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.logical_and.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


def _dilated(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.logical_or.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


def _components(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the 4-connected components of `mask`, each as (ys, xs)."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask))}
    parts = []
    while left:
        queue = [left.pop()]
        part = []
        while queue:
            y, x = queue.pop()
            part.append((y, x))
            for neighbor in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if neighbor in left:
                    left.remove(neighbor)
                    queue.append(neighbor)
        ys, xs = np.array(part).T
        parts.append((ys, xs))
    return parts
