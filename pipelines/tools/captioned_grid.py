"""Pictures with text: grids with captions and titles, rendered large enough to be looked at.

Sizes are in pixels, `(width, height)` as in Pillow.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PAPER = (255, 255, 255)
INK = (38, 38, 38)
FRAME = (217, 217, 217)
MARGIN = 16  # around the grid
GAP = 12  # between pictures
CELL = 192  # smaller pictures are enlarged towards this width
MAX_CAPTION_LINES = 4
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def image_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    cell: int = CELL,
) -> Image.Image:
    """`images` in rows of `columns`, each with its caption wrapped under it; returns one RGB picture.

    Small pictures are enlarged by a whole factor with nearest neighbour, so that each pixel stays what it is, until
    they are about `cell` wide; none is made smaller.

    Args:
        images: any mode and size; transparent ones are laid on a checkerboard. An empty list gives an empty sheet.
        captions: none, or up to one per picture.
        columns: None takes the squarest grid.
        row_titles: shown to the left, one per row.
        column_titles: shown on top, one per column.
        cell: width in pixels that pictures are enlarged towards.

    Raises:
        ValueError: more captions than images, or `columns` below 1.
    """
    captions = list(captions or [])
    if len(captions) > len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns}; it must be at least 1")
    if not images:
        return Image.new("RGB", (2 * MARGIN + cell, 2 * MARGIN + cell // 2), PAPER)
    columns = min(columns or _squarest(len(images)), len(images))
    pictures = [_enlarged(_opaque(image), cell) for image in images]
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    font_size = _font_size(width)
    texts = [_wrapped(text, width, font_size) for text in captions] + [[]] * (len(pictures) - len(captions))
    rows = [list(zip(pictures, texts))[start : start + columns] for start in range(0, len(pictures), columns)]
    return _sheet(rows, columns, (width, height), font_size, list(row_titles or []), list(column_titles or []))


def comparison_grid(
    rows: Sequence[Sequence[Image.Image]],
    column_titles: Sequence[str],
    *,
    row_titles: Sequence[str] | None = None,
    cell: int = CELL,
) -> Image.Image:
    """One row per example, one titled column per version of it (original, reconstruction, ...).

    Raises:
        ValueError: a row with another number of pictures than there are titles.
    """
    for number, row in enumerate(rows):
        if len(row) != len(column_titles):
            raise ValueError(f"row {number} has {len(row)} pictures for {len(column_titles)} column titles")
    images = [image for row in rows for image in row]
    return image_grid(images, columns=len(column_titles), column_titles=column_titles, row_titles=row_titles, cell=cell)


def _sheet(
    rows: list[list[tuple[Image.Image, list[str]]]],
    columns: int,
    cell_size: tuple[int, int],
    font_size: int,
    row_titles: list[str],
    column_titles: list[str],
) -> Image.Image:
    width, height = cell_size
    line_height = _line_height(font_size)
    left = MARGIN + (_title_width(row_titles, font_size) + GAP if row_titles else 0)
    title_lines = [_wrapped(title, width, font_size, bold=True) for title in column_titles]
    top = MARGIN + (max(map(len, title_lines)) * line_height + GAP // 2 if title_lines else 0)
    caption_heights = [max(len(text) for _, text in row) * line_height for row in rows]
    row_heights = [height + (6 + caption if caption else 0) for caption in caption_heights]
    total = (
        left + columns * width + (columns - 1) * GAP + MARGIN,
        top + sum(row_heights) + (len(rows) - 1) * GAP + MARGIN,
    )
    sheet = Image.new("RGB", total, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(title_lines[:columns]):
        _write(draw, (left + column * (width + GAP), MARGIN), lines, font_size, bold=True)
    y = top
    for number, (row, row_height) in enumerate(zip(rows, row_heights)):
        if number < len(row_titles):
            lines = _wrapped(row_titles[number], left - MARGIN - GAP, font_size, bold=True, max_lines=8)
            _write(draw, (MARGIN, y), lines, font_size, bold=True)
        for column, (picture, text) in enumerate(row):
            x = left + column * (width + GAP)
            draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)
            sheet.paste(picture, (x, y))
            _write(draw, (x, y + height + 6), text, font_size)
        y += row_height + GAP
    return sheet


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[str], font_size: int, bold: bool = False
) -> None:
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * _line_height(font_size)), line, fill=INK, font=_font(font_size, bold))


def _squarest(count: int) -> int:
    """The number of columns whose grid has no empty cell if one near the square root divides `count`."""
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


def _enlarged(image: Image.Image, cell: int) -> Image.Image:
    factor = max(1, round(cell / max(image.size)))
    if factor == 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _font_size(width: int) -> int:
    return max(11, min(18, width // 12))


def _line_height(font_size: int) -> int:
    return round(font_size * 1.3)


def _title_width(titles: list[str], font_size: int) -> int:
    """Room for the longest title, but no more than ten characters' worth: longer ones wrap."""
    font = _font(font_size, bold=True)
    longest_word = max((font.getlength(word) for title in titles for word in title.split()), default=0.0)
    longest = max((font.getlength(title) for title in titles), default=0.0)
    return math.ceil(max(longest_word, min(longest, 12 * font_size)))


@lru_cache(maxsize=32)
def _font(size: int, bold: bool = False) -> Font:
    """DejaVu Sans where matplotlib is installed, which ships it: it has accents, Greek and Cyrillic. Else Pillow's own.

    matplotlib is looked for and not imported: pipelines do without it, and its import takes a second.
    """
    matplotlib = importlib.util.find_spec("matplotlib")
    for folder in (matplotlib.submodule_search_locations or ()) if matplotlib else ():
        path = Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def _wrapped(
    text: str, width: int, font_size: int, *, bold: bool = False, max_lines: int = MAX_CAPTION_LINES
) -> list[str]:
    """`text` in lines no wider than `width` pixels, at most `max_lines` of them, cut short with an ellipsis."""
    font = _font(font_size, bold)
    lines: list[str] = []
    for word in " ".join(text.split()).split(" "):
        for piece in _pieces(word, width, font):
            if lines and font.getlength(f"{lines[-1]} {piece}") <= width:
                lines[-1] = f"{lines[-1]} {piece}"
            elif piece:
                lines.append(piece)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip(" ,.;") + "…"]


def _pieces(word: str, width: int, font: Font) -> list[str]:
    """`word` cut where it would be wider than `width` (languages without spaces, long file names)."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces
