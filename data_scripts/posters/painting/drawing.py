"""Draw the elements of a poster, and at the same time its feature maps.

Legend: S pixels along one side of the finished poster; u grid units, UNITS along one side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from data_scripts.posters.brief import PosterBrief, pick
from data_scripts.posters.elements import UNITS, Box, Element, Scene, TextLines, Title, corners_of, turned
from data_scripts.posters.layout import TITLE_BAND
from data_scripts.posters.painting.lettering import PHRASES, flow_text, line_mask, text_width, word_mask
from data_scripts.posters.painting.pictures import paint_scene, scene_tones
from data_scripts.posters.painting.sheet import SUPERSAMPLING, Color, FeatureMaps, Fill, Sheet
from data_scripts.posters.painting.textures import cast_shadow, graded, printed_and_scanned, with_jpeg_noise
from data_scripts.posters.photographs.gallery import take_photograph
from pipelines.common.poster_domain import COLOR_ROLES

GREEKED_BELOW = {"plain": 6, "standard": 4, "rich": 4}
"""Small text with an x-height below this number of pixels is drawn as bars ("greeked"). `plain` posters have a higher
limit, because their letters must be clean."""

KEYLINE = 0.25
"""Width of the frame around a picture (u)."""

SHADOW = 0.4
CLIPPED_TONES = 3
"""Percentage of the tones at either end that a duotone in the poster's own colours clips."""
BODY_X_HEIGHT = 0.5
BODY_FONT_SIZE = 0.7
BAND_MARGIN = 0.5
"""Margin of the band of a rotated title, above and below the letters (u)."""
SCAN = 1
"""Random stream of focus and light; all other textures use the main stream."""
GRADED_ROLES = ("background", "primary", "accent")


@dataclass(frozen=True)
class DrawnPoster:
    """The poster P_Image ("RGB") and its feature maps F_Tensor, both S × S."""

    image: Image.Image
    maps: FeatureMaps


def draw_poster(
    brief: PosterBrief, elements: list[Element], resolution: int, complexity: str, seed: int
) -> DrawnPoster:
    """Draw a poster of `resolution` px square. `seed` determines the textures and the words of the small text."""
    rng = np.random.default_rng(seed)
    sheet = _blank_sheet(brief, resolution, complexity, rng)
    for element in elements:
        content = element.content
        if isinstance(content, tuple):
            sheet.print_shapes(element.box, content, round(255 * element.hierarchy), element.opacity)
        elif isinstance(content, Scene):
            _draw_picture(sheet, element, content, brief.color_of("ink"), complexity)
        elif isinstance(content, TextLines):
            color = mixed(brief.color_of("ink"), brief.color_of("background"), content.ink_share)
            as_bars = BODY_X_HEIGHT * resolution / UNITS < GREEKED_BELOW[complexity]
            _draw_lines(sheet, element, content, color, pick(rng, range(len(PHRASES))), as_bars=as_bars)
        else:
            _draw_title(sheet, brief, element, content)
    image = sheet.poster()
    if complexity != "plain":
        image = printed_and_scanned(image, rng, np.random.default_rng([seed, SCAN]))
    if complexity == "rich":
        image = with_jpeg_noise(image, rng)
    return DrawnPoster(image, sheet.feature_maps())


def _blank_sheet(brief: PosterBrief, resolution: int, complexity: str, rng: np.random.Generator) -> Sheet:
    fills: dict[str, Fill] = {role: brief.color_of(role) for role in COLOR_ROLES}
    if complexity != "plain":
        graded_fills = {role: graded(brief.color_of(role), resolution, SUPERSAMPLING, rng) for role in GRADED_ROLES}
        fills |= {**graded_fills, "secondary": graded_fills["accent"]}
    return Sheet(resolution, fills, {role: COLOR_ROLES.index(brief.seen_role(role)) for role in COLOR_ROLES})


def _draw_picture(sheet: Sheet, element: Element, scene: Scene, ink: Color, complexity: str) -> None:
    """Draw the picture, with or without a keyline of ink. Its shadow darkens the paper, but not the maps."""
    x0, y0, x1, y1 = box = sheet.pixel_box(element.box)
    if complexity != "plain" and scene.mount != "bare":
        cast_shadow(sheet.paper, box, round(SHADOW * sheet.scale))
    sheet.print_box(element.box, ink, "ink")
    width = KEYLINE if scene.mount == "keyline" else 0.0  # u
    line = max(round(width * sheet.scale), 1) if width else 0
    inner = (x0 + line, y0 + line, x1 - line, y1 - line)
    sheet.paper.paste(_picture(sheet, scene, inner, complexity), inner)
    sheet.mark_box(element.box, image_mask=255, hierarchy=round(255 * element.hierarchy))
    left, top, right, bottom = element.box
    sheet.mark_box((left + width, top + width, right - width, bottom - width), color_role=_SURFACE)


def _picture(sheet: Sheet, scene: Scene, corners: tuple[int, int, int, int], complexity: str) -> Image.Image:
    """Return the scene as an RGB image for `corners` (samples): a drawing, or a photograph in `rich` posters.

    With a duotone of the poster's own colours, its lightest (or darkest) parts have the texture of the paper.
    """
    x0, y0, x1, y1 = corners
    size = (x1 - x0, y1 - y0)
    if complexity == "rich":
        picture = _photograph(sheet, scene, size)
    elif scene.duotone is None:
        picture = paint_scene(scene.subject, size, scene.seed, shaded=complexity != "plain")
    else:
        picture = scene_tones(scene.subject, size, scene.seed)
    if scene.duotone is None:
        return picture
    dark, light = (sheet.swatch(role, corners) for role in scene.duotone)
    return Image.composite(light, dark, ImageOps.autocontrast(picture.convert("L"), cutoff=CLIPPED_TONES))


def _photograph(sheet: Sheet, scene: Scene, size: tuple[int, int]) -> Image.Image:
    pixels = (-(-size[0] // SUPERSAMPLING), -(-size[1] // SUPERSAMPLING))
    photograph = take_photograph(scene.subject, pixels, sheet.resolution / UNITS, scene.seed)
    return photograph.resize(size, Image.Resampling.NEAREST)


def mixed(ink: Color, ground: Color, share: float) -> Color:
    """Mix two colours: `share` of `ink`, the rest of `ground`."""
    red, green, blue = (round(share * a + (1 - share) * b) for a, b in zip(ink, ground, strict=True))
    return red, green, blue


def _draw_lines(
    sheet: Sheet, element: Element, lines: TextLines, color: Color, first_phrase: int, *, as_bars: bool
) -> None:
    x0, y0, x1, y1 = sheet.pixel_box(element.box)
    mask = Image.new("L", (x1 - x0, y1 - y0), 0)
    boxes = line_boxes(element.box, lines)
    corners = [sheet.pixel_box(box) for box in boxes]
    if as_bars:
        for left, top, right, bottom in corners:
            mask.paste(255, (left - x0, top - y0, right - x0, bottom - y0))
    else:
        font_pixels = round(BODY_FONT_SIZE * sheet.scale)
        texts = flow_text(first_phrase, tuple(right - left for left, _, right, _ in corners), font_pixels)
        for text, (left, top, right, bottom) in zip(texts, corners, strict=True):
            line = line_mask(text, (right - left, 2 * (bottom - top)), font_pixels, lines.align)
            mask.paste(line, (left - x0, top - (bottom - top) // 2 - y0))
        widths = [text_width(text, font_pixels) / sheet.scale for text in texts]
        boxes = [_as_wide_as(box, width, lines.align) for box, width in zip(boxes, widths, strict=True) if width]
    _print_turned(sheet, mask, element, color, "ink")
    _mark_text(sheet, element, boxes)


def line_boxes(box: Box, lines: TextLines) -> list[Box]:
    """Return a box for each line of the text block `box`, as high as the x-height of the line."""
    x0, y0, x1, _ = box
    boxes = []
    for number, share in enumerate(lines.widths):
        width = share * (x1 - x0)
        left = x0 if lines.align == "left" else (x0 + x1 - width) / 2
        top = y0 + number + 0.25
        boxes.append((left, top, left + width, top + BODY_X_HEIGHT))
    return boxes


def _as_wide_as(box: Box, width: float, align: str) -> Box:
    """Narrow `box` to `width`, the width of the words in it."""
    x0, y0, x1, y1 = box
    left = x0 if align == "left" else (x0 + x1 - width) / 2
    return (left, y0, left + width, y1)


def _draw_title(sheet: Sheet, brief: PosterBrief, element: Element, title: Title) -> None:
    """Draw the title in ink or, if it is inverted, in the background's colour on a band of ink."""
    letters = "ink"
    if title.inverted:
        _draw_band(sheet, brief, element)
        letters = "background"
    x0, y0, x1, y1 = sheet.pixel_box(element.box)
    mask = word_mask(title.word, title.font, (x1 - x0, y1 - y0))
    _print_turned(sheet, mask, element, brief.color_of(letters), letters)
    _mark_text(sheet, element, [element.box])


def _draw_band(sheet: Sheet, brief: PosterBrief, element: Element) -> None:
    """Draw the band of ink behind a title, across the whole page and rotated with the title."""
    if not element.angle:
        top, bottom = TITLE_BAND[brief.title_position]
        sheet.print_box((0, top, UNITS, bottom), brief.color_of("ink"), "ink")
        return
    _, y0, _, y1 = element.box
    band = corners_of((-UNITS, y0 - BAND_MARGIN, 2 * UNITS, y1 + BAND_MARGIN))
    sheet.print_polygon(turned(band, element.center, element.angle), brief.color_of("ink"), "ink")


def _print_turned(sheet: Sheet, mask: Image.Image, element: Element, color: Color, role: str) -> None:
    """Print `mask` in the box of the element, rotated with the element."""
    x0, y0, _, _ = sheet.pixel_box(element.box)
    if not element.angle:
        sheet.print_mask(mask, (x0, y0), color, role)
        return
    rotated = mask.rotate(element.angle, Image.Resampling.BICUBIC, expand=True)
    left, top = x0 + (mask.width - rotated.width) / 2, y0 + (mask.height - rotated.height) / 2
    sheet.print_mask(rotated, (round(left), round(top)), color, role)


def _mark_text(sheet: Sheet, element: Element, boxes: list[Box]) -> None:
    """Record lines of text in the maps. A picture below them remains marked, because it is visible between letters."""
    values = {"text_mask": 255, "hierarchy": round(255 * element.hierarchy)}
    for box in boxes:
        if element.angle:
            sheet.mark_polygon(turned(corners_of(box), element.center, element.angle), **values)
        else:
            sheet.mark_box(box, **values)


_SURFACE = COLOR_ROLES.index("surface")
