"""The report on an analysed poster, for `analyze.py` and the studio: its values, and an image that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

PANEL, MARGIN, GAP = 360, 24, 16
PAPER, INK, FAINT, BAR = (255, 255, 255), (38, 38, 38), (225, 225, 225), (59, 111, 182)
FONT_SIZE = 16


def describe(image: Image, reading: Any, path: Path) -> dict[str, Any]:
    """Return what was read from one poster as plain values; the colour of a role is the median colour of its pixels."""
    import numpy as np

    from ..common.pixels import to_rgb
    from ..common.poster_domain import COLOR_ROLES

    features = reading.features[0]
    pixels = np.asarray(to_rgb(image))
    role_pixels = {name: pixels[features[2] == number] for number, name in enumerate(COLOR_ROLES)}
    medians = {name: np.median(own, axis=0).astype(int).tolist() for name, own in role_pixels.items() if len(own)}
    roles = np.bincount(features[2].astype(int).ravel(), minlength=len(COLOR_ROLES)) / features[2].size
    facts: dict[str, Any] = {
        "file": str(path),
        "width": int(features.shape[2]),
        "height": int(features.shape[1]),
        "text_share": round(float(features[0].mean()), 4),
        "picture_share": round(float(features[1].mean()), 4),
        "color_role_shares": {name: round(float(share), 4) for name, share in zip(COLOR_ROLES, roles, strict=True)},
        "color_role_colors": {name: "#{:02x}{:02x}{:02x}".format(*color) for name, color in medians.items()},
    }
    if reading.grammar is not None:
        facts |= reading.counts[0]
        facts["grammar"] = {name: round(value, 4) for name, value in reading.grammar[0].items()}
    return facts


def sheet(image: Image, reading: Any, facts: dict[str, Any]) -> Image:
    """Draw the report on one poster: four panels, the colour roles, and the design grammar as bars if the model has an
    abstractor."""
    from PIL import Image as PIL_Image
    from PIL import ImageDraw, ImageFont

    from ..common.layout_pictures import draw_features, draw_hierarchy
    from ..common.pixels import to_rgb

    features: np.ndarray = reading.features[0]
    upright = to_rgb(image)
    panels = {
        "the poster": upright,
        "text (red), pictures (green)": reading.overlays[0],
        "colour roles": draw_features(features),
        "what leads the eye": draw_hierarchy(features),
    }
    font = ImageFont.load_default(FONT_SIZE)
    scale = PANEL / max(upright.size)
    width, height = (max(1, round(side * scale)) for side in upright.size)
    rows = _rows(facts)
    line = FONT_SIZE + 10
    total_height = 2 * MARGIN + height + 2 * line + (2 * GAP + line * ((len(rows) + 1) // 2))
    page = PIL_Image.new("RGB", (2 * MARGIN + len(panels) * width + (len(panels) - 1) * GAP, total_height), PAPER)
    draw = ImageDraw.Draw(page)
    for number, (title, panel) in enumerate(panels.items()):
        x = MARGIN + number * (width + GAP)
        # Enlarging a map of classes smoothly would show colours that stand for no class.
        resampling = PIL_Image.Resampling.LANCZOS if number < 2 or scale < 1 else PIL_Image.Resampling.NEAREST
        draw.text((x, MARGIN), title, fill=INK, font=font)
        page.paste(panel.resize((width, height), resampling), (x, MARGIN + line))
        draw.rectangle((x, MARGIN + line, x + width - 1, MARGIN + line + height - 1), outline=FAINT)
    top, half = MARGIN + line + height + GAP, (page.width - 2 * MARGIN + GAP) // 2
    _swatches(draw, top, page.width, facts, font)
    top += line + GAP
    for number, (name, text, share) in enumerate(rows):
        x, y = MARGIN + (number % 2) * half, top + (number // 2) * line
        _bar(draw, (x, y), half - GAP, name, text, share, font)
    return page


def _rows(facts: dict[str, Any]) -> list[tuple[str, str, float | None]]:
    """Return (name, value as text, length of its bar or None) for each line below the panels."""
    rows: list[tuple[str, str, float | None]] = [
        ("text", f"{facts['text_share']:.0%} of the page", facts["text_share"]),
        ("pictures", f"{facts['picture_share']:.0%} of the page", facts["picture_share"]),
    ]
    if "grammar" in facts:
        blocks = facts["text_blocks"]
        rows[0] = ("text", f"{blocks} block{'s' * (blocks != 1)}, {rows[0][1]}", facts["text_share"])
        rows[1] = ("pictures", f"{facts['pictures']}, {rows[1][1]}", facts["picture_share"])
        rows += [(name.replace("_", " "), f"{value:.2f}", value) for name, value in facts["grammar"].items()]
    return rows


def _swatches(draw: Any, top: int, page_width: int, facts: dict[str, Any], font: Any) -> None:
    """Draw a legend of the colour roles: for each, its colour in the panel, its colour in the poster, and its share."""
    from ..common.layout_pictures import ROLE_COLORS

    shares, colors = facts["color_role_shares"], facts["color_role_colors"]
    step = (page_width - 2 * MARGIN) // len(shares)
    for number, (name, share) in enumerate(shares.items()):
        x = MARGIN + number * step
        code = tuple(int(channel) for channel in ROLE_COLORS[number])
        for place, color in enumerate((code, colors.get(name))):
            left = x + place * (FONT_SIZE + 2)
            if color:
                draw.rectangle((left, top, left + FONT_SIZE, top + FONT_SIZE), fill=color, outline=FAINT)
        words = f"{name} {share:.0%}" if name in colors else f"no {name}"
        draw.text((x + 2 * FONT_SIZE + 12, top - 2), words, fill=INK, font=font)


def _bar(draw: Any, at: tuple[int, int], width: int, name: str, text: str, share: float | None, font: Any) -> None:
    x, y = at
    names, texts = 11 * FONT_SIZE, 13 * FONT_SIZE
    draw.text((x, y), name, fill=INK, font=font)
    left, right = x + names, x + width - texts
    draw.rectangle((left, y + 5, right, y + FONT_SIZE), fill=FAINT)
    if share:
        draw.rectangle((left, y + 5, left + max(1, round(share * (right - left))), y + FONT_SIZE), fill=BAR)
    draw.text((right + GAP, y), text, fill=INK, font=font)
