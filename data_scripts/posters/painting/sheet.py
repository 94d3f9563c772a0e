"""The paper that a poster is drawn on, and four feature maps that record what was drawn where.

Everything is drawn SUPERSAMPLING times larger. The poster is then averaged; the values of the maps cannot be averaged,
so one sample per pixel is kept. Legend: S pixels along one side of the finished poster; u grid units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw

from data_scripts.posters.elements import UNITS, Box, Point, Shape
from pipelines.common.poster_domain import COLOR_ROLES, F_TENSOR_CHANNELS

SUPERSAMPLING = 4
"""Averages over 4 × 4 samples keep flat colours exactly flat and give edges without the halo of a sharpening filter."""

Color = tuple[int, int, int]
Fill = Color | Image.Image
"""A colour, or an image as large as the sheet whose pixels are used wherever something is printed."""
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
        fills: for each of COLOR_ROLES, the colour or image that its shapes and the background are printed with.
        role_ids: the class id of each role in the map `color_role`.
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
        """Return the fill of `role` at `corners` (x0, y0, x1, y1 in px) as an image of that size."""
        x0, y0, x1, y1 = corners
        fill = self.fills[role]
        return fill.crop(corners) if isinstance(fill, Image.Image) else Image.new("RGB", (x1 - x0, y1 - y0), fill)

    def print_mask(self, mask: Image.Image, corner: Corner, color: Color, role: str) -> None:
        """Print `color` through `mask` ("L", upper left at `corner` in px); record `role` where it exceeds 1/2."""
        self.paper.paste(color, corner, mask)
        self.maps["color_role"].paste(self.role_ids[role], corner, mask.point(_MAJORITY))

    def print_box(self, box: Box, color: Color, role: str) -> None:
        """Fill `box`, record `role`, and clear what the other maps recorded there."""
        corners = self.pixel_box(box)
        self.paper.paste(color, corners)
        self.mark_box(box, text_mask=0, image_mask=0, color_role=self.role_ids[role], hierarchy=0)

    def print_polygon(self, points: list[Point], color: Color, role: str) -> None:
        """Fill a polygon (u), record `role`, and clear what the other maps recorded there."""
        self._draw_polygon(self.paper, points, color)
        self.mark_polygon(points, text_mask=0, image_mask=0, color_role=self.role_ids[role], hierarchy=0)

    def print_shapes(self, box: Box, shapes: tuple[Shape, ...], hierarchy: int, opacity: float) -> None:
        """Print `shapes` clipped to `box`.

        The masks of covered text and pictures are cleared, unless they remain visible (`opacity` below 1). Shapes in
        the background's colour are holes in the other shapes, so their hierarchy is 0.
        """
        x0, y0, x1, y1 = self.pixel_box(box)
        # Shapes are first drawn as the numbers of their roles, and each number is then replaced by its fill.
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
        (left, top), (right, bottom) = points  # Pillow includes the last row and column
        getattr(draw, shape.kind)((left, top, max(right - 1, left), max(bottom - 1, top)), fill=number)

    def mark_box(self, box: Box, **values: int) -> None:
        """Set the maps named in `values` to these values in `box`, rounded to whole pixels of the finished poster."""
        x0, y0, x1, y1 = (round(value * self.resolution / UNITS) * SUPERSAMPLING for value in box)
        for name, value in values.items():
            self.maps[name].paste(value, (x0, y0, x1, y1))

    def mark_polygon(self, points: list[Point], **values: int) -> None:
        """Set the maps named in `values` to these values in a polygon (u)."""
        for name, value in values.items():
            self._draw_polygon(self.maps[name], points, value)

    def _draw_polygon(self, page: Image.Image, points: list[Point], fill: Color | int) -> None:
        ImageDraw.Draw(page).polygon([(x * self.scale, y * self.scale) for x, y in points], fill=fill)

    def poster(self) -> Image.Image:
        """Return the finished poster: RGB, S × S."""
        return self.paper.reduce(SUPERSAMPLING)

    def feature_maps(self) -> FeatureMaps:
        """Return the maps, with the sample nearest to the centre of each pixel."""
        size = (self.resolution, self.resolution)
        return FeatureMaps(**{name: page.resize(size, Image.Resampling.NEAREST) for name, page in self.maps.items()})


_MAJORITY = [255 if value > 127 else 0 for value in range(256)]
