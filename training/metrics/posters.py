"""Read a poster's picture and compare it with its brief, by image analysis alone; real posters check the reader itself.

Legend: a poster is H × W × 3, uint8 RGB (NumPy, PIL or torch), square, of a `plain` dataset. A brief is a row of the
posters' dataset (or a dict with its `palette`, `background`, `pictures` and `title_position`).

What is read, at 64 px (larger posters are averaged down first):
- pictures: patches of the cool monochrome that `plain` pictures are printed in, as large and as solid as a picture;
- the title: the ten rows whose pixels go back and forth most often between the ink and the background;
- the background: the colour name that most pixels outside pictures are nearest to.

The reader knows the palette that was asked for, never where things were asked for. A poster of whose pixels less than
half have a colour of the palette or of a picture is unreadable, and unreadable is wrong whatever the brief says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.common.poster_domain import COLORS, PICTURE_TINT, TITLE_POSITIONS, color_distance, rgb_color

Brief = Mapping[str, Any]

READING_PIXELS = 64
PALETTE_DISTANCE = 40.0
"""A pixel has a colour of the palette within this RGB distance of it."""

TONE_DISTANCE = 28.0
"""How far from the pictures' monochrome a pixel may lie."""
TONE_RANGE = (56.0, 250.0)
SMALLEST_PICTURE = 10
"""Least width and height of a picture in pixels (the generator's smallest is 14 inside its frame)."""
LEAST_FILL = 0.6
"""Least share of a picture's box that has its tones."""

TITLE_ROWS = 8
INK_LINE_DISTANCE = 45.0
"""How far from the straight line between background and ink a pixel of a letter (edges included) may lie."""
INK_FROM, INK_TO = 0.3, 0.6
"""Where on that line a pixel starts to count as ink, and where it counts in full."""
LEAST_CROSSINGS = 3.0
"""A title row crosses between ink and background at least so often (counted softly)."""
CLEAR_LEAD = 1.25
"""The title's rows must cross so many times more often than any rows elsewhere."""


def reading_copy(image: Any) -> np.ndarray:
    """The poster as READING_PIXELS × READING_PIXELS × 3, float32, 0..255.

    Raises:
        ValueError: not a square RGB picture whose side is a multiple of 64.
    """
    pixels = np.asarray(image)
    if (
        pixels.ndim != 3
        or pixels.shape[2] != 3
        or pixels.shape[0] != pixels.shape[1]
        or pixels.shape[0] % READING_PIXELS
    ):
        raise ValueError(f"a poster is H × W × 3 with H = W = a multiple of {READING_PIXELS}; got shape {pixels.shape}")
    block = pixels.shape[0] // READING_PIXELS
    cells = pixels.astype(np.float32).reshape(READING_PIXELS, block, READING_PIXELS, block, 3)
    return cells.mean(axis=(1, 3))


def find_pictures(image: Any) -> list[tuple[int, int, int, int]]:
    """Boxes (x0, y0, x1, y1; pixels of the 64 px copy, ends excluded) of the pictures in the poster."""
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
    """Whether at least half of the pixels are of the asked palette or of a picture."""
    pixels = reading_copy(image)
    return bool((_near_palette(pixels, brief["palette"]) | _has_picture_tone(pixels)).mean() >= 0.5)


def count_pictures(image: Any, brief: Brief) -> int | None:
    """How many pictures the poster shows; None when it is unreadable."""
    return len(find_pictures(image)) if is_readable(image, brief) else None


def read_title_position(image: Any, brief: Brief) -> str | None:
    """'top', 'middle' or 'bottom': the third of the page in which the title is; None when no title stands out."""
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
    """The name in COLORS that most pixels outside the pictures are nearest to."""
    pixels = reading_copy(image)[~_picture_mask(image)]
    table = np.array(list(COLORS.values()), dtype=np.float32)
    nearest = color_distance(pixels[:, None], table).argmin(axis=1)
    return list(COLORS)[int(np.bincount(nearest, minlength=len(COLORS)).argmax())]


def palette_share(image: Any, palette: Sequence[str]) -> float:
    """Share of the pixels outside the pictures that lie within PALETTE_DISTANCE of a colour of `palette` (#rrggbb).

    Pictures are found by the reader itself, in real and in generated posters alike: what does not look like a picture
    gets no pardon for its colours.
    """
    outside = ~_picture_mask(image)
    return float(_near_palette(reading_copy(image), palette)[outside].mean()) if outside.any() else 0.0


def measure_posters(generated: Sequence[Any], briefs: Sequence[Brief], real: Sequence[Any]) -> dict[str, float]:
    """How well generated posters follow their briefs, and what the same reader says of real posters of the same briefs.

    Args:
        generated, real: N posters each, in the order of `briefs`.

    Returns:
        background_color_share: share of the generated posters whose background is nearest to the asked colour's name.
        palette_share_ratio: mean share of pixels within RGB distance 40 of one of the asked colours, pictures left out,
            over the same mean for the real posters. (A blank poster's is above 1: read it with the other figures.)
        title_position_share: share of the generated posters whose title is where the brief says.
        picture_count_share: share with the right number of pictures.
        reader_background_color_share_real, reader_title_position_share_real, reader_picture_count_share_real: the same
            on the real posters: what a perfect model would be given.
        <name>_standard_error: one standard error of each share (binomial, N posters) and of the ratio (over posters).

    Raises:
        ValueError: the three have different lengths, or are empty.
    """
    if not len(generated) == len(briefs) == len(real) > 0:
        raise ValueError(
            f"as many posters as briefs, at least one: got {len(generated)}, {len(briefs)} and {len(real)}"
        )
    shares = {
        "background_color_share": _agreement(generated, briefs, _background_agrees),
        "title_position_share": _agreement(generated, briefs, _title_agrees),
        "picture_count_share": _agreement(generated, briefs, _pictures_agree),
        "reader_background_color_share_real": _agreement(real, briefs, _background_agrees),
        "reader_title_position_share_real": _agreement(real, briefs, _title_agrees),
        "reader_picture_count_share_real": _agreement(real, briefs, _pictures_agree),
    }
    made = np.array([palette_share(image, brief["palette"]) for image, brief in zip(generated, briefs)])
    asked = np.array([palette_share(image, brief["palette"]) for image, brief in zip(real, briefs)])
    ratio = float(made.mean() / max(asked.mean(), 1e-9))
    errors = {f"{name}_standard_error": math.sqrt(share * (1 - share) / len(briefs)) for name, share in shares.items()}
    ratio_error = float((made - ratio * asked).std() / max(asked.mean(), 1e-9) / math.sqrt(len(briefs)))
    return {**shares, "palette_share_ratio": ratio, **errors, "palette_share_ratio_standard_error": ratio_error}


def _agreement(images: Sequence[Any], briefs: Sequence[Brief], agrees: Any) -> float:
    return sum(agrees(image, brief) for image, brief in zip(images, briefs)) / len(briefs)


def _background_agrees(image: Any, brief: Brief) -> bool:
    return background_color_name(image) == brief["background"]


def _title_agrees(image: Any, brief: Brief) -> bool:
    return read_title_position(image, brief) == brief["title_position"]


def _pictures_agree(image: Any, brief: Brief) -> bool:
    return count_pictures(image, brief) == brief["pictures"]


def _near_palette(pixels: np.ndarray, palette: Sequence[str]) -> np.ndarray:
    table = np.array([rgb_color(code) for code in palette], dtype=np.float32)
    return color_distance(pixels[..., None, :], table).min(axis=-1) <= PALETTE_DISTANCE


def _has_picture_tone(pixels: np.ndarray) -> np.ndarray:
    """Which pixels lie near the line tone × PICTURE_TINT."""
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
    """How often each row goes from background to ink or back (64 numbers), pictures and their frames left out."""
    pixels = reading_copy(image)
    background = np.array(COLORS[brief["background"]], dtype=np.float32)
    ink = np.array(rgb_color(brief["palette"][-1]), dtype=np.float32)
    line = ink - background
    along = np.clip((pixels - background) @ line / (line @ line), 0, 1)
    off_line = color_distance(pixels, background + along[..., None] * line) > INK_LINE_DISTANCE
    # The blurred edge of a shape passes near the line at its background end: count from a third of the way on.
    inkness = np.clip((along - INK_FROM) / (INK_TO - INK_FROM), 0, 1)
    # A shape's colour may lie on the line (pink between red and cream); it is still no letter.
    shapes = brief["palette"][1:-1]
    inkness[off_line | _near_palette(pixels, shapes)] = 0.0
    for x0, y0, x1, y1 in find_pictures(image):
        inkness[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = 0.0
    return np.abs(np.diff(inkness, axis=1)).sum(axis=1)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Pixels whose 3 × 3 neighbourhood is all set (outside counts as unset)."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.logical_and.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


def _dilated(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.logical_or.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


def _components(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The 4-connected parts of `mask`, each as (ys, xs)."""
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
