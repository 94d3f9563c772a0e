"""From elements to pixels: the poster itself (drawn four times too large, then averaged down) and its feature maps.

Legend: S pixels along one side of the finished poster; u grid units, UNITS along one side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data_scripts.posters.brief import PosterBrief, pick
from data_scripts.posters.elements import UNITS, Box, Element, Scene, Shape, TextLines, Title
from data_scripts.posters.layout import TITLE_BAND
from data_scripts.posters.lettering import PHRASES, flow_text, line_mask, word_mask
from data_scripts.posters.pictures import paint_scene
from data_scripts.posters.textures import cast_shadow, graded, with_grain
from pipelines.poster_domain import COLOR_ROLES

SUPERSAMPLING = 4
"""Averaging 4 × 4 samples keeps flat colours exactly flat and gives edges without the halo of a sharpening filter."""

GREEKED_BELOW = 6
"""Small text whose x-height is under this many pixels is set as bars ("greeked"): letters would be grey mush."""

KEYLINE = 0.25
"""Width of the frame around a picture (u)."""

SHADOW = 0.4
BODY_X_HEIGHT = 0.5
BODY_FONT_SIZE = 0.7
GRADED_ROLES = ("background", "primary", "accent")


Fill = int | tuple[int, int, int] | Image.Image
"""A value, a colour, or a picture as large as the page that shows through where there is a shape."""


@dataclass(frozen=True)
class FeatureMaps:
    """F_Tensor as uint8 "L" images, S × S: masks {0, 255}, class ids 0..5, hierarchy 0..255."""

    text_mask: Image.Image
    image_mask: Image.Image
    color_role: Image.Image
    hierarchy: Image.Image


class Page:
    """A square of pixels addressed in grid units."""

    def __init__(self, pixels: int, mode: str, fill: Fill):
        self.scale = pixels / UNITS
        self.image = fill.copy() if isinstance(fill, Image.Image) else Image.new(mode, (pixels, pixels), fill)

    def pixel_box(self, box: Box) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = (round(value * self.scale) for value in box)
        return x0, y0, x1, y1

    def fill_box(self, box: Box, fill: Fill) -> None:
        corners = self.pixel_box(box)
        self.image.paste(fill.crop(corners) if isinstance(fill, Image.Image) else fill, corners)

    def draw_shapes(self, box: Box, shapes: tuple[Shape, ...], fills: Mapping[str, Fill], opacity: float = 1.0) -> None:
        """Draw `shapes` clipped to `box`; `fills` maps a role to what this page paints it with."""
        x0, y0, x1, y1 = self.pixel_box(box)
        # Shapes are drawn as the numbers of their roles; the fills are then laid in where the numbers are.
        names = list(fills)
        roles = Image.new("L", (x1 - x0, y1 - y0), 0)
        draw = ImageDraw.Draw(roles)
        for shape in shapes:
            number = names.index(shape.role) + 1
            points = [(x * self.scale - x0, y * self.scale - y0) for x, y in shape.points]
            if shape.kind == "polygon":
                draw.polygon(points, fill=number)
                continue
            (left, top), (right, bottom) = points  # Pillow counts the last row and column in
            corners = (left, top, max(right - 1, left), max(bottom - 1, top))
            getattr(draw, shape.kind)(corners, fill=number)
        for number in {names.index(shape.role) + 1 for shape in shapes}:
            covered = roles.point([round(255 * opacity) if value == number else 0 for value in range(256)])
            fill = fills[names[number - 1]]
            inside = fill.crop((x0, y0, x1, y1)) if isinstance(fill, Image.Image) else fill
            self.image.paste(inside, (x0, y0, x1, y1), covered)


def draw_poster(
    brief: PosterBrief, elements: list[Element], resolution: int, complexity: str, seed: int
) -> Image.Image:
    """The finished poster: RGB, `resolution` px square. `seed` is for textures and the words of the small text."""
    rng = np.random.default_rng(seed)
    pixels = resolution * SUPERSAMPLING
    standard = complexity == "standard"
    fills: dict[str, Fill] = {role: brief.color_of(role) for role in COLOR_ROLES}
    if standard:
        graded_fills = {role: graded(brief.color_of(role), resolution, SUPERSAMPLING, rng) for role in GRADED_ROLES}
        fills |= {**graded_fills, "secondary": graded_fills["accent"]}
    page = Page(pixels, "RGB", fills["background"])
    for element in elements:
        content = element.content
        if isinstance(content, tuple):
            page.draw_shapes(element.box, content, fills, element.opacity)
        elif isinstance(content, Scene):
            _draw_picture(page, element.box, content, brief.color_of("ink"), shaded=standard)
        elif isinstance(content, TextLines):
            _draw_lines(page, element.box, content, brief.color_of("ink"), resolution, rng)
        else:
            _draw_title(page, brief, element.box, content)
    poster = page.image.reduce(SUPERSAMPLING)
    return with_grain(poster, rng) if standard else poster


def _draw_picture(page: Page, box: Box, scene: Scene, ink: tuple[int, int, int], *, shaded: bool) -> None:
    x0, y0, x1, y1 = page.pixel_box(box)
    if shaded:
        cast_shadow(page.image, (x0, y0, x1, y1), round(SHADOW * page.scale))
    page.fill_box(box, ink)
    line = max(round(KEYLINE * page.scale), 1)
    size = (x1 - x0 - 2 * line, y1 - y0 - 2 * line)
    page.image.paste(paint_scene(scene.subject, size, scene.seed, shaded=shaded), (x0 + line, y0 + line))


def _draw_lines(
    page: Page, box: Box, lines: TextLines, ink: tuple[int, int, int], resolution: int, rng: np.random.Generator
) -> None:
    first_phrase = pick(rng, range(len(PHRASES)))
    boxes = line_boxes(box, lines)
    if BODY_X_HEIGHT * resolution / UNITS < GREEKED_BELOW:
        for line_box in boxes:
            page.fill_box(line_box, ink)
        return
    font_pixels = round(BODY_FONT_SIZE * page.scale)
    corners = [page.pixel_box(line_box) for line_box in boxes]
    texts = flow_text(first_phrase, tuple(x1 - x0 for x0, _, x1, _ in corners), font_pixels)
    for text, (x0, y0, x1, y1) in zip(texts, corners, strict=True):
        height = 2 * (y1 - y0)
        mask = line_mask(text, (x1 - x0, height), font_pixels, lines.align)
        page.image.paste(ink, (x0, y0 - (y1 - y0) // 2), mask)


def line_boxes(box: Box, lines: TextLines) -> list[Box]:
    """The boxes of the lines' x-heights in the block `box`."""
    x0, y0, x1, _ = box
    boxes = []
    for number, share in enumerate(lines.widths):
        width = share * (x1 - x0)
        left = x0 if lines.align == "left" else (x0 + x1 - width) / 2
        top = y0 + number + 0.25
        boxes.append((left, top, left + width, top + BODY_X_HEIGHT))
    return boxes


def _draw_title(page: Page, brief: PosterBrief, box: Box, title: Title) -> None:
    letters = brief.color_of("ink")
    if title.inverted:
        top, bottom = TITLE_BAND[brief.title_position]
        page.fill_box((0, top, UNITS, bottom), letters)
        letters = brief.color_of("background")
    x0, y0, x1, y1 = page.pixel_box(box)
    page.image.paste(letters, (x0, y0), word_mask(title.word, title.font, (x1 - x0, y1 - y0)))


def draw_feature_maps(brief: PosterBrief, elements: list[Element], resolution: int) -> FeatureMaps:
    """F_Tensor of the poster, each map S × S."""
    text, image, role, hierarchy = (Page(resolution, "L", 0) for _ in range(4))
    role_ids = {name: number for number, name in enumerate(COLOR_ROLES)}
    for element in elements:
        content = element.content
        boxes = line_boxes(element.box, content) if isinstance(content, TextLines) else [element.box]
        for box in boxes:
            if element.kind in ("title", "text"):
                text.fill_box(box, 255)
                hierarchy.fill_box(box, round(255 * element.hierarchy))
            image.fill_box(box, 255 if element.kind == "picture" else 0)
        if element.kind == "picture":
            role.fill_box(element.box, role_ids["surface"])
            hierarchy.fill_box(element.box, round(255 * element.hierarchy))
        elif isinstance(content, tuple):
            role.draw_shapes(element.box, content, role_ids)
            strength = {name: round(255 * element.hierarchy) for name in COLOR_ROLES} | {"background": 0}
            hierarchy.draw_shapes(element.box, content, strength)
        elif isinstance(content, TextLines):
            for box in boxes:
                role.fill_box(box, role_ids["ink"])
        elif isinstance(content, Title):
            _draw_title_role(role, brief, element.box, content, role_ids)
    return FeatureMaps(text.image, image.image, role.image, hierarchy.image)


def _draw_title_role(role: Page, brief: PosterBrief, box: Box, title: Title, role_ids: dict[str, int]) -> None:
    letters = role_ids["ink"]
    if title.inverted:
        top, bottom = TITLE_BAND[brief.title_position]
        role.fill_box((0, top, UNITS, bottom), role_ids["ink"])
        letters = role_ids["background"]
    x0, y0, x1, y1 = role.pixel_box(box)
    mask = word_mask(title.word, title.font, (x1 - x0, y1 - y0)).point(lambda v: 255 if v > 127 else 0)
    role.image.paste(letters, (x0, y0), mask)
