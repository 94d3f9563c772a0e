"""A contact sheet to check before training: images, each beside its controls."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_scripts.posters.painting.lettering import font_path

CELL = 128  # pixels of the longer side of an image
GAP, MARGIN, BETWEEN, HEADER = 4, 20, 18, 40
WIDEST = 1400
PAPER, INK, FRAME = (250, 250, 248), (60, 60, 60), (215, 215, 210)


def sheet_of(
    rows: Sequence[tuple[Image.Image, Sequence[Image.Image]]], title: str, columns: Sequence[str]
) -> Image.Image:
    """Draw all `rows` on one RGB image, with as many rows side by side as fit.

    Args:
        rows: pairs of an image and its controls.
        title: name of the dataset.
        columns: names of the controls.
    """
    cells = 1 + len(columns)
    width = cells * CELL + (cells - 1) * GAP
    groups = max(1, min(len(rows), (WIDEST - 2 * MARGIN + BETWEEN) // (width + BETWEEN)))
    lines = -(-len(rows) // groups)
    size = (2 * MARGIN + groups * (width + BETWEEN) - BETWEEN, HEADER + lines * (CELL + GAP) + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    font = ImageFont.truetype(str(font_path("DejaVuSans")), 13)
    ImageDraw.Draw(sheet).text((MARGIN, 12), f"{title}: image, {', '.join(columns)}", font=font, fill=INK)
    for number, (image, controls) in enumerate(rows):
        left, top = MARGIN + number % groups * (width + BETWEEN), HEADER + number // groups * (CELL + GAP)
        for place, one in enumerate((image, *controls)):
            sheet.paste(_in_cell(one), (left + place * (CELL + GAP), top))
    return sheet


def _in_cell(image: Image.Image) -> Image.Image:
    """Place the whole image in the middle of a square cell: small images enlarged by an integer, large ones reduced."""
    cell = Image.new("RGB", (CELL, CELL), FRAME)
    factor = CELL // max(image.size)
    if factor >= 1:
        shown = image.convert("RGB").resize([side * factor for side in image.size], Image.Resampling.NEAREST)
    else:
        shown = ImageOps.contain(image.convert("RGB"), (CELL, CELL), Image.Resampling.LANCZOS)
    cell.paste(shown, ((CELL - shown.width) // 2, (CELL - shown.height) // 2))
    return cell
