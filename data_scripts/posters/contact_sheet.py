"""A contact sheet to check before training: posters, each beside a copy that shows its masks, above its caption."""

from __future__ import annotations

import io
import textwrap

from PIL import Image, ImageDraw, ImageFont

from data_scripts.posters.painting.lettering import font_path
from data_scripts.posters.records import Row
from pipelines.tools.files import open_image_file

POSTER_PIXELS = 256
GAP = 12
CAPTION_HEIGHT = 44
LEGEND_HEIGHT = 28
TEXT_TINT, IMAGE_TINT, BOX_LINE = (230, 30, 60), (20, 120, 230), (255, 255, 255)
LEGEND = "left: the poster; right: text mask red, image mask blue, element boxes in white"


def contact_sheet(rows: list[Row], columns: int = 3) -> Image.Image:
    """Draw the posters in `rows` on one RGB image, with `columns` posters per line."""
    cell_width, cell_height = 2 * POSTER_PIXELS + 2 * GAP, POSTER_PIXELS + CAPTION_HEIGHT + GAP
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell_width + GAP, lines * cell_height + GAP + LEGEND_HEIGHT), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(str(font_path("DejaVuSans")), 13)
    draw.text((GAP, GAP), LEGEND, font=font, fill=(90, 90, 90))
    for number, row in enumerate(rows):
        x = GAP + number % columns * cell_width
        y = GAP + LEGEND_HEIGHT + number // columns * cell_height
        sheet.paste(_enlarged(_decoded(row["image"])), (x, y))
        sheet.paste(_overlaid(row), (x + POSTER_PIXELS + GAP // 2, y))
        draw.text((x, y + POSTER_PIXELS + 5), "\n".join(textwrap.wrap(row["text"], 72)), font=font, fill=(20, 20, 20))
    return sheet


def _decoded(stored: Row) -> Image.Image:
    return open_image_file(io.BytesIO(stored["bytes"]))


def _enlarged(image: Image.Image) -> Image.Image:
    return image.resize((POSTER_PIXELS, POSTER_PIXELS), Image.Resampling.NEAREST)


def _overlaid(row: Row) -> Image.Image:
    poster = _enlarged(_decoded(row["image"]).convert("L").convert("RGB"))
    for name, tint in (("text_mask", TEXT_TINT), ("image_mask", IMAGE_TINT)):
        strength = _enlarged(_decoded(row[name])).point(lambda value: 140 if value else 0)
        poster.paste(tint, (0, 0), strength)
    draw = ImageDraw.Draw(poster)
    for element in row["elements"]:
        corners = [round(element[name] * (POSTER_PIXELS - 1)) for name in ("x0", "y0", "x1", "y1")]
        draw.rectangle(corners, outline=BOX_LINE)
    return poster
