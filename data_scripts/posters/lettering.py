"""Real type, from the fonts that matplotlib ships: the same letters, and so the same bytes, on every machine."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipelines.cli import UserError

DRAWN_SIZE = 256
"""Titles are drawn at this size and scaled down to their box."""

WORDS = (
    "open daily from ten to six", "admission free", "the new season begins", "works on paper", "doors at eight",
    "curated in the old hall", "every friday night", "spring and summer", "with a lecture at noon", "first edition",
    "galleries one to five", "tickets at the door", "music by the river", "a journal of form", "until late",
)  # fmt: skip
BODY_FONT = "DejaVuSans-Bold"


@cache
def font_path(name: str) -> Path:
    """Raises UserError when the installed matplotlib lacks the font."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    if not path.is_file():
        raise UserError(f"the font {name} is not in matplotlib's data folder ({path}); reinstall matplotlib")
    return path


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine is in every build of Pillow; raqm, where present, would kern differently.
    return ImageFont.truetype(str(font_path(name)), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=512)
def word_mask(word: str, font: str, size: tuple[int, int]) -> Image.Image:
    """`word` scaled to fill `size` (width, height in px) exactly: an "L" image, 255 where there is ink."""
    drawn = _font(font, DRAWN_SIZE)
    left, top, right, bottom = drawn.getbbox(word)
    mask = Image.new("L", (int(right - left), int(bottom - top)), 0)
    ImageDraw.Draw(mask).text((-left, -top), word, font=drawn, fill=255)
    return mask.resize(size, Image.Resampling.BOX if size[0] < mask.width else Image.Resampling.BICUBIC)


@lru_cache(maxsize=2048)
def line_mask(phrase: int, x_height: int, width: int) -> Image.Image:
    """A line of small text as wide as `width` px at most, starting from the phrase of that number: an "L" image."""
    font = _font(BODY_FONT, round(x_height * 1.75))
    text = ""
    for k in range(len(WORDS)):
        for word in WORDS[(phrase + k) % len(WORDS)].split():
            longer = f"{text} {word}".strip()
            if font.getlength(longer) > width:
                return _typeset(text or word, font, width, x_height)
            text = longer
    return _typeset(text, font, width, x_height)


def _typeset(text: str, font: ImageFont.FreeTypeFont, width: int, x_height: int) -> Image.Image:
    mask = Image.new("L", (width, 2 * x_height), 0)
    ImageDraw.Draw(mask).text((0, round(1.5 * x_height)), text, font=font, fill=255, anchor="ls")
    return mask
