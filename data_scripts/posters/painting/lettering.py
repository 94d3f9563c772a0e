"""Text in the fonts that come with matplotlib, so that letters have the same bytes on every machine."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipelines.tools.cli import UserError

LETTERS, LETTER_GAP = "ACEGHLMNORSW", 0.08
"""The width of a letter's cell is that of the widest of LETTERS plus LETTER_GAP as a fraction of it."""

DRAWN_SIZE = 256
"""Titles are drawn at this size and scaled down to their box."""

PHRASES = (
    "open daily from ten to six", "admission free", "the new season begins", "works on paper", "doors at eight",
    "curated in the old hall", "every friday night", "spring and summer", "with a lecture at noon", "first edition",
    "galleries one to five", "tickets at the door", "music by the river", "a journal of form", "until late",
)  # fmt: skip
BODY_FONT = "DejaVuSans"


@cache
def font_path(name: str) -> Path:
    """Return the path of the font. Raise UserError if the installed matplotlib does not have it."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    if not path.is_file():
        raise UserError(f"the font {name} is not in matplotlib's data folder ({path}); reinstall matplotlib")
    return path


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # Every build of Pillow has the basic layout engine; raqm is not in all of them and has other kerning.
    return ImageFont.truetype(str(font_path(name)), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=512)
def word_mask(word: str, font: str, size: tuple[int, int]) -> Image.Image:
    """Draw `word` in `size` (width, height in px), each letter in a cell: an "L" image, 255 where there is ink.

    Letters keep their relative widths (an I is narrower than an M) and are centred in their cells.
    """
    drawn = _font(font, DRAWN_SIZE)
    _, top, _, bottom = drawn.getbbox(word)
    boxes = [drawn.getbbox(letter) for letter in word]
    widest = max(right - left for left, _, right, _ in (drawn.getbbox(letter) for letter in LETTERS))
    cell = widest * (1 + LETTER_GAP)
    mask = Image.new("L", (round(cell * len(word)), int(bottom - top)), 0)
    for number, (letter, (left, _, right, _)) in enumerate(zip(word, boxes, strict=True)):
        x = (number + 0.5) * cell - (left + right) / 2
        ImageDraw.Draw(mask).text((x, -top), letter, font=drawn, fill=255)
    return mask.resize(size, Image.Resampling.BOX if size[0] < mask.width else Image.Resampling.BICUBIC)


@lru_cache(maxsize=4096)
def line_mask(text: str, size: tuple[int, int], font_pixels: int, align: str) -> Image.Image:
    """Draw a line of text in `size` (width, height in px), with the baseline at 3/4 of the height: an "L" image."""
    width, height = size
    mask = Image.new("L", size, 0)
    x, anchor = (0, "ls") if align == "left" else (width // 2, "ms")
    ImageDraw.Draw(mask).text((x, 3 * height // 4), text, font=_font(BODY_FONT, font_pixels), fill=255, anchor=anchor)
    return mask


def text_width(text: str, font_pixels: int) -> float:
    """Return the width of `text` in the font of small text (px)."""
    return _font(BODY_FONT, font_pixels).getlength(text)


def flow_text(first_phrase: int, widths: tuple[int, ...], font_pixels: int) -> list[str]:
    """Fill lines of these widths (px) with words from phrase `first_phrase` on, without words longer than a line."""
    font = _font(BODY_FONT, font_pixels)
    words = [word for k in range(len(PHRASES)) for word in PHRASES[(first_phrase + k) % len(PHRASES)].split()]
    lines = []
    for width in widths:
        line = ""
        for number, word in enumerate(words):
            longer = f"{line} {word}".lstrip()
            if font.getlength(longer) <= width:
                line, words[number] = longer, ""
            elif line:
                break
        words = [word for word in words if word]
        lines.append(line)
    return lines
