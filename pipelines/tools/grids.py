"""Arrange images for viewing: grids with or without text, small images enlarged, control images in colour.

Sizes are in pixels, `(width, height)` as in Pillow. Shapes: C control channels, H W pixels.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

PAPER = (255, 255, 255)
INK = (38, 38, 38)
FRAME = (217, 217, 217)
MARGIN = 16  # around a grid with text
GAP = 12  # between its images
PLAIN_GAP = 4  # around and between the images of a grid without text
CELL = 192  # in a grid with text, smaller images are enlarged towards this width
MIN_SHOWN_SIDE = 128  # images with a shorter side below this are hard to see on a screen
CHANNEL_COLORS = ((1, 1, 1), (0.9, 0.3, 0.2), (0.2, 0.5, 0.9), (0.95, 0.8, 0.2), (0.3, 0.7, 0.4), (0.6, 0.4, 0.8))
MAX_CAPTION_LINES = 4
MAX_TITLE_LINES = 2
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Spacing(NamedTuple):
    """Spacing of the images of a grid, and whether each has a frame."""

    margin: int
    gap: int
    framed: bool


WITH_TEXT, PLAIN = Spacing(MARGIN, GAP, framed=True), Spacing(PLAIN_GAP, PLAIN_GAP, framed=False)


def image_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    cell: int = CELL,
) -> Image.Image:
    """Arrange images in rows of `columns`, with their captions below them, and return one RGB image.

    Small images are enlarged to about `cell` pixels by a whole factor with nearest neighbour, which keeps pixels exact;
    no image is made smaller.

    Args:
        images: Images of any mode and size; transparent ones are shown on a checkerboard. An empty list gives an empty
            sheet.
        captions: At most one caption per image.
        columns: Number of columns; None chooses the most square grid.
        row_titles: Titles to the left of the rows.
        column_titles: Titles above the columns.
        cell: Width in pixels that small images are enlarged to.

    Raises:
        ValueError: If there are more captions than images, or `columns` is below 1.
    """
    captions = list(captions or [])
    if len(captions) > len(images):
        raise ValueError(f"there are {len(captions)} captions for {len(images)} images; give at most one per image")
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns}; it must be at least 1")
    if not images:
        return Image.new("RGB", (2 * MARGIN + cell, 2 * MARGIN + cell // 2), PAPER)
    columns = min(columns or _squarest(len(images)), len(images))
    shown = [_times(_opaque(image), round(cell / max(image.size))) for image in images]
    width = max(image.width for image in shown)
    texts = [_wrapped(text, width, _font_size(width)) for text in captions] + [[]] * (len(shown) - len(captions))
    rows = [list(zip(shown, texts))[start : start + columns] for start in range(0, len(shown), columns)]
    return _sheet(rows, columns, WITH_TEXT, list(row_titles or []), list(column_titles or []))


def comparison_grid(
    rows: Sequence[Sequence[Image.Image]],
    column_titles: Sequence[str],
    *,
    row_titles: Sequence[str] | None = None,
    cell: int = CELL,
) -> Image.Image:
    """Arrange images in a grid with one row per example and one titled column per version of it.

    Raises:
        ValueError: If the number of images in a row differs from the number of titles.
    """
    for number, row in enumerate(rows):
        if len(row) != len(column_titles):
            raise ValueError(f"row {number} has {len(row)} images for {len(column_titles)} column titles")
    images = [image for row in rows for image in row]
    return image_grid(images, columns=len(column_titles), column_titles=column_titles, row_titles=row_titles, cell=cell)


def plain_grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] | None = None) -> Image.Image:
    """Arrange rows of images of one size on white, and return one RGB image. Rows may differ in length.

    Args:
        titles: Title of each row, written above it in at most `MAX_TITLE_LINES` lines; longer ones are truncated.
    """
    sheet = _sheet([[(_opaque(image), []) for image in row] for row in rows], max(map(len, rows)), PLAIN, [], [])
    width, font_size = sheet.width - 2 * PLAIN_GAP, _font_size(sheet.width // 2)
    lines = [_wrapped(title, width, font_size, max_lines=MAX_TITLE_LINES) for title in titles or []]
    if not any(lines):
        return sheet
    bands = [len(text) * _line_height(font_size) + PLAIN_GAP for text in lines]
    titled = Image.new("RGB", (sheet.width, sheet.height + sum(bands)), PAPER)
    draw, row_height, y = ImageDraw.Draw(titled), (sheet.height - PLAIN_GAP) // len(rows), 0
    for number, (text, band) in enumerate(zip(lines, bands)):
        _write(draw, (PLAIN_GAP, y + PLAIN_GAP), text, font_size)
        top = number * row_height
        titled.paste(sheet.crop((0, top, sheet.width, top + row_height)), (0, y + band))
        y += band + row_height
    return titled


def enlarged(image: Image.Image, factor: int | None = None) -> Image.Image:
    """Enlarge an image by a whole factor; None is the one that makes the shorter side at least `MIN_SHOWN_SIDE`."""
    return _times(image, factor or -(-MIN_SHOWN_SIDE // min(image.size)))


def control_to_pil(control: Tensor) -> Image.Image:
    """Convert a control (C H W, in [0, 1]) to an image: three channels are RGB, otherwise each channel has a colour."""
    channels = control.detach().float().cpu().numpy()
    if len(channels) != 3:
        colors = np.resize(np.array(CHANNEL_COLORS), (len(channels), 3))
        channels = (channels[:, None] * colors[:, :, None, None]).max(0)
    pixels = (channels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _sheet(
    rows: list[list[tuple[Image.Image, list[str]]]],
    columns: int,
    spacing: Spacing,
    row_titles: list[str],
    column_titles: list[str],
) -> Image.Image:
    """Draw rows of (image, lines of its caption) on one sheet; every cell is as large as the largest image."""
    margin, gap, framed = spacing
    width = max(image.width for row in rows for image, _ in row)
    height = max(image.height for row in rows for image, _ in row)
    font_size = _font_size(width)
    line_height = _line_height(font_size)
    left = margin + (_title_width(row_titles, font_size) + gap if row_titles else 0)
    title_lines = [_wrapped(title, width, font_size, bold=True) for title in column_titles]
    top = margin + (max(map(len, title_lines)) * line_height + gap // 2 if title_lines else 0)
    caption_heights = [max(len(text) for _, text in row) * line_height for row in rows]
    row_heights = [height + (6 + caption if caption else 0) for caption in caption_heights]
    total = (
        left + columns * width + (columns - 1) * gap + margin,
        top + sum(row_heights) + (len(rows) - 1) * gap + margin,
    )
    sheet = Image.new("RGB", total, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(title_lines[:columns]):
        _write(draw, (left + column * (width + gap), margin), lines, font_size, bold=True)
    y = top
    for number, (row, row_height) in enumerate(zip(rows, row_heights)):
        if number < len(row_titles):
            lines = _wrapped(row_titles[number], left - margin - gap, font_size, bold=True, max_lines=8)
            _write(draw, (margin, y), lines, font_size, bold=True)
        for column, (image, text) in enumerate(row):
            x = left + column * (width + gap)
            if framed:
                draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=FRAME)
            sheet.paste(image, (x, y))
            _write(draw, (x, y + height + 6), text, font_size)
        y += row_height + gap
    return sheet


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[str], font_size: int, bold: bool = False
) -> None:
    for number, line in enumerate(lines):
        font = _font(font_size, bold)
        draw.text((at[0], at[1] + number * _line_height(font_size)), _drawable(line, font), fill=INK, font=font)


def _squarest(count: int) -> int:
    """Return a number of columns near the square root of `count`, if possible one that leaves no cell empty."""
    root = math.ceil(math.sqrt(count))
    return next((columns for columns in range(root, min(count, 2 * root) + 1) if count % columns == 0), root)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    tile = max(4, image.width // 16)
    board = Image.new("RGB", image.size, (255, 255, 255))
    draw = ImageDraw.Draw(board)
    for y in range(0, image.height, tile):
        for x in range((y // tile % 2) * tile, image.width, 2 * tile):
            draw.rectangle((x, y, x + tile - 1, y + tile - 1), fill=(230, 230, 230))
    board.paste(image, (0, 0), image)
    return board


def _times(image: Image.Image, factor: int) -> Image.Image:
    """Enlarge each pixel to a square of `factor` pixels; a factor of 1 or below returns the image unchanged."""
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _font_size(width: int) -> int:
    return max(11, min(18, width // 12))


def _line_height(font_size: int) -> int:
    return round(font_size * 1.3)


def _title_width(titles: list[str], font_size: int) -> int:
    """Return the width in pixels of the column of row titles, limited so that long titles are wrapped."""
    font = _font(font_size, bold=True)
    longest_word = max((_length(word, font) for title in titles for word in title.split()), default=0.0)
    longest = max((_length(title, font) for title in titles), default=0.0)
    return math.ceil(max(min(longest_word, 24 * font_size), min(longest, 12 * font_size)))


@lru_cache(maxsize=32)
def _font(size: int, bold: bool = False) -> Font:
    """Load DejaVu Sans, which has accents, Greek and Cyrillic, from matplotlib if it is installed, or Pillow's font.

    matplotlib is located but not imported, because the import takes a second.
    """
    matplotlib = importlib.util.find_spec("matplotlib")
    for folder in (matplotlib.submodule_search_locations or ()) if matplotlib else ():
        path = Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def _drawable(text: str, font: Font) -> str:
    """Return a text with `?` for what the font cannot draw: without FreeType, Pillow's font has only Latin-1.

    DejaVu Sans draws an empty box for a character that it lacks.
    """
    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")


def _length(text: str, font: Font) -> float:
    return font.getlength(_drawable(text, font))


def _wrapped(
    text: str, width: int, font_size: int, *, bold: bool = False, max_lines: int = MAX_CAPTION_LINES
) -> list[str]:
    """Wrap text to at most `max_lines` lines of `width` pixels; longer text is truncated with an ellipsis."""
    font = _font(font_size, bold)
    lines: list[str] = []
    for word in " ".join(text.split()).split(" "):
        for piece in _pieces(word, width, font):
            if lines and _length(f"{lines[-1]} {piece}", font) <= width:
                lines[-1] = f"{lines[-1]} {piece}"
            elif piece:
                lines.append(piece)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and _length(last + "…", font) > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip(" ,.;") + "…"]


def _pieces(word: str, width: int, font: Font) -> list[str]:
    """Split a word that is wider than `width` pixels (languages without spaces, long file names)."""
    pieces = [""]
    for character in word:
        if pieces[-1] and _length(pieces[-1] + character, font) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces
