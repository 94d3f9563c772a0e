"""The paper that a poster is drawn on, and under it the four maps that record what was drawn where.

Everything is drawn SUPERSAMPLING times too large. The poster is averaged down; of the maps, whose values cannot be
averaged, one sample per pixel is kept. Legend: S pixels along one side of the finished poster; u grid units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw

from data_scripts.posters.elements import UNITS, Box, Point, Shape
from pipelines.common.poster_domain import COLOR_ROLES, F_TENSOR_CHANNELS

SUPERSAMPLING = 4
"""Averaging 4 × 4 samples keeps flat colours exactly flat and gives edges without the halo of a sharpening filter."""

Color = tuple[int, int, int]
Fill = Color | Image.Image
"""A colour, or a picture as large as the sheet that shows through where something is printed."""
Corner = tuple[int, int]


@dataclass(frozen=True)
class FeatureMaps:
    """F_Tensor as uint8 "L" images, S × S: masks {0, 255}, class ids 0..5, hierarchy 0..255."""

    text_mask: Image.Image
    image_mask: Image.Image
    color_role: Image.Image
    hierarchy: Image.Image


class Sheet:
    """A square of paper addressed in grid units.

    Args:
        resolution: S.
        fills: what shapes of each of COLOR_ROLES, and the ground, are printed with.
        role_ids: the class id that each role is recorded as.
    """

    def __init__(self, resolution: int, fills: Mapping[str, Fill], role_ids: Mapping[str, int]):
        pixels = resolution * SUPERSAMPLING
        self.resolution, self.scale = resolution, pixels / UNITS
        self.fills, self.role_ids = fills, role_ids
        ground = fills["background"]
        self.paper = ground.copy() if isinstance(ground, Image.Image) else Image.new("RGB", (pixels, pixels), ground)
        self.maps = {name: Image.new("L", (pixels, pixels), 0) for name in F_TENSOR_CHANNELS}

    def pixel_box(self, box: Box) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = (round(value * self.scale) for value in box)
        return x0, y0, x1, y1

    def swatch(self, role: str, corners: tuple[int, int, int, int]) -> Image.Image:
        """What `role` is printed with at `corners` (x0, y0, x1, y1 in px), as a picture of that size."""
        x0, y0, x1, y1 = corners
        fill = self.fills[role]
        return fill.crop(corners) if isinstance(fill, Image.Image) else Image.new("RGB", (x1 - x0, y1 - y0), fill)

    def print_mask(self, mask: Image.Image, corner: Corner, color: Color, role: str) -> None:
        """Print `color` through `mask` ("L"), its upper left at `corner` (px), and record `role` where it prevails."""
        self.paper.paste(color, corner, mask)
        self.maps["color_role"].paste(self.role_ids[role], corner, mask.point(_MAJORITY))

    def print_box(self, box: Box, color: Color, role: str) -> None:
        """Fill `box`; whatever lies under it ends there."""
        corners = self.pixel_box(box)
        self.paper.paste(color, corners)
        self.mark_box(box, text_mask=0, image_mask=0, color_role=self.role_ids[role], hierarchy=0)

    def print_polygon(self, points: list[Point], color: Color, role: str) -> None:
        """The same for a polygon (u)."""
        self._draw_polygon(self.paper, points, color)
        self.mark_polygon(points, text_mask=0, image_mask=0, color_role=self.role_ids[role], hierarchy=0)

    def print_shapes(self, box: Box, shapes: tuple[Shape, ...], hierarchy: int, opacity: float) -> None:
        """Print `shapes` clipped to `box`. What they cover ends there, unless it shows through (`opacity` under 1);
        shapes in the background's colour are holes in the others, and lead the eye nowhere."""
        x0, y0, x1, y1 = self.pixel_box(box)
        # Shapes are drawn as the numbers of their roles; the fills are then laid in where the numbers are.
        numbers = Image.new("L", (x1 - x0, y1 - y0), 0)
        draw = ImageDraw.Draw(numbers)
        for shape in shapes:
            self._draw_shape(draw, shape, (x0, y0), COLOR_ROLES.index(shape.role) + 1)
        for number in {COLOR_ROLES.index(shape.role) + 1 for shape in shapes}:
            covered = numbers.point([round(255 * opacity) if value == number else 0 for value in range(256)])
            fill = self.fills[COLOR_ROLES[number - 1]]
            inside = fill.crop((x0, y0, x1, y1)) if isinstance(fill, Image.Image) else fill
            self.paper.paste(inside, (x0, y0, x1, y1), covered)
        drawn = numbers.point([0] + [255] * 255)
        ids, strengths = [0] * 256, [0] * 256
        for index, role in enumerate(COLOR_ROLES):
            ids[index + 1] = self.role_ids[role]
            strengths[index + 1] = 0 if role == "background" else hierarchy
        self.maps["color_role"].paste(numbers.point(ids), (x0, y0), drawn)
        self.maps["hierarchy"].paste(numbers.point(strengths), (x0, y0), drawn)
        if opacity == 1:
            self.maps["text_mask"].paste(0, (x0, y0), drawn)
            self.maps["image_mask"].paste(0, (x0, y0), drawn)

    def _draw_shape(self, draw: ImageDraw.ImageDraw, shape: Shape, corner: Corner, number: int) -> None:
        points = [(x * self.scale - corner[0], y * self.scale - corner[1]) for x, y in shape.points]
        if shape.kind == "polygon":
            draw.polygon(points, fill=number)
            return
        (left, top), (right, bottom) = points  # Pillow counts the last row and column in
        getattr(draw, shape.kind)((left, top, max(right - 1, left), max(bottom - 1, top)), fill=number)

    def mark_box(self, box: Box, **values: int) -> None:
        """Record `values`, by the maps' names, all over `box`, to whole pixels of the finished poster."""
        x0, y0, x1, y1 = (round(value * self.resolution / UNITS) * SUPERSAMPLING for value in box)
        for name, value in values.items():
            self.maps[name].paste(value, (x0, y0, x1, y1))

    def mark_polygon(self, points: list[Point], **values: int) -> None:
        """Record `values` all over a polygon (u)."""
        for name, value in values.items():
            self._draw_polygon(self.maps[name], points, value)

    def _draw_polygon(self, page: Image.Image, points: list[Point], fill: Color | int) -> None:
        ImageDraw.Draw(page).polygon([(x * self.scale, y * self.scale) for x, y in points], fill=fill)

    def poster(self) -> Image.Image:
        """What was printed: RGB, S × S."""
        return self.paper.reduce(SUPERSAMPLING)

    def feature_maps(self) -> FeatureMaps:
        """What was recorded: of each pixel, the sample nearest to its middle."""
        size = (self.resolution, self.resolution)
        return FeatureMaps(**{name: page.resize(size, Image.Resampling.NEAREST) for name, page in self.maps.items()})


_MAJORITY = [255 if value > 127 else 0 for value in range(256)]
