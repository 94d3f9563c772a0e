"""The motifs (large shapes) of the styles. Each motif fills a given area (u) and returns its elements.

Some motifs extend to the edges of the area, the others keep a distance from them. Sizes and positions are multiples of
a module (2 u) where possible, so that a motif looks the same in every place.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from data_scripts.posters.brief import pick
from data_scripts.posters.elements import UNITS, Box, Element, Point, Shape, circle, polygon, rectangle

SIDE_MARGIN, MARGIN, GAP = 2.0, 1.0, 1.0
SHAPE_HIERARCHY = 0.5

Motif = Callable[[Box, np.random.Generator], list[Element]]


def draw_motif(name: str, area: Box, rng: np.random.Generator) -> list[Element]:
    """Return the elements of the motif `name` in `area`."""
    return MOTIFS[name](area, rng)


def _inset(area: Box) -> Box:
    """Return the part of `area` that a shape can fill without touching its neighbours."""
    x0, y0, x1, y1 = area
    return max(x0, SIDE_MARGIN), y0 + MARGIN, min(x1, UNITS - SIDE_MARGIN), y1 - MARGIN


def _group(area: Box, shapes: list[Shape], role: str = "primary") -> list[Element]:
    return [Element("shape", role, SHAPE_HIERARCHY, area, tuple(shapes))]


def _single(shape: Shape) -> Element:
    (x0, y0), (x1, y1) = shape.points
    return Element("shape", shape.role, SHAPE_HIERARCHY, (x0, y0, x1, y1), (shape,))


def _aligned(low: float, high: float, size: float, position: str) -> float:
    """Return the start of a shape of `size` that is aligned between `low` and `high`."""
    if position == "left":
        return low
    if position == "right":
        return high - size
    return (low + high - size) / 2


def circles(count: int) -> Motif:
    def motif(area: Box, rng: np.random.Generator) -> list[Element]:
        x0, y0, x1, y1 = _inset(area)
        diameter = 2 * math.floor(min(y1 - y0, (x1 - x0) / count) / 2)
        left = _aligned(x0, x1, diameter * count, pick(rng, ("left", "center", "right")))
        top = _aligned(y0, y1, diameter, "center")
        roles = ("primary", "accent", "primary")
        radius = (diameter - (GAP if count > 1 else 0)) / 2
        return [
            _single(circle(left + (i + 0.5) * diameter, top + diameter / 2, radius, roles[i])) for i in range(count)
        ]

    return motif


def lone_shape(kind: str) -> Motif:
    def motif(area: Box, rng: np.random.Generator) -> list[Element]:
        x0, y0, x1, y1 = _inset(area)
        size = 4.0 if y1 - y0 < 6 else 6.0
        left = _aligned(x0, x1, size, pick(rng, ("left", "right")))
        top = _aligned(y0, y1, size, "center")
        return [_single(Shape(kind, ((left, top), (left + size, top + size)), "primary"))]

    return motif


def wedge(area: Box, rng: np.random.Generator) -> list[Element]:
    """A triangle that points inwards from one side, with a bar of the accent behind it, after El Lissitzky."""
    x0, y0, x1, y1 = area
    middle = (y0 + y1) / 2
    base, tip = (x0, x1 - SIDE_MARGIN) if rng.random() < 0.5 else (x1, x0 + SIDE_MARGIN)
    inward = 1.0 if tip > base else -1.0
    triangle = polygon([(base + 2 * inward, y0), (tip, middle), (base + 2 * inward, y1)], "primary")
    left = min(base, base + inward)
    return _group(area, [rectangle(left, y0, left + 1, y1, "accent"), triangle])


def diagonal_bars(area: Box, rng: np.random.Generator) -> list[Element]:
    x0, y0, x1, y1 = area
    height = y1 - y0
    lean = 1.0 if rng.random() < 0.5 else -1.0
    shapes = []
    for number, left in enumerate(np.arange(x0 - height, x1 + height, 4.0)):
        bottom, top = (left, left + lean * height)
        corners = [(bottom, y1), (bottom + 2, y1), (top + 2, y0), (top, y0)]
        shapes.append(polygon([(float(x), y) for x, y in corners], ("primary", "accent")[number % 2]))
    return _group(area, shapes)


def rays(area: Box, rng: np.random.Generator) -> list[Element]:
    """A sunburst from the lower or the upper edge of the area."""
    x0, y0, x1, y1 = area
    rising = rng.random() < 0.5
    cx, cy, sign = (x0 + x1) / 2, (y1 if rising else y0), (-1.0 if rising else 1.0)
    reach, sectors = 2 * UNITS, 13
    shapes: list[Shape] = []
    for k in range(0, sectors, 2):
        angles = (math.pi * k / sectors, math.pi * (k + 1) / sectors)
        ends = [(cx + reach * math.cos(a), cy + sign * reach * math.sin(a)) for a in angles]
        shapes.append(polygon([(cx, cy), *ends], "primary"))
    shapes += [circle(cx, cy, 3.0, "background"), circle(cx, cy, 2.0, "accent")]
    return _group(area, shapes)


def fan(area: Box, rng: np.random.Generator) -> list[Element]:
    """Concentric half rings on the lower or the upper edge of the area."""
    x0, y0, x1, y1 = _inset(area)
    radius = min(y1 - y0, (x1 - x0) / 2)
    cx, cy = (x0 + x1) / 2, (y1 if rng.random() < 0.5 else y0)
    roles = ("primary", "background", "accent")
    shapes = [circle(cx, cy, radius * (1 - k / len(roles)), role) for k, role in enumerate(roles)]
    return _group((cx - radius, y0 if cy == y0 else cy - radius, cx + radius, y1 if cy == y1 else cy + radius), shapes)


def halftone_dots(area: Box, rng: np.random.Generator) -> list[Element]:
    """Dots on a square grid that grow from one side to the other, as in a halftone."""
    x0, y0, x1, y1 = area
    grows_right = rng.random() < 0.5
    shapes = []
    for x in np.arange(x0 + 1, x1, 2.0):
        share = (x - x0) / (x1 - x0)
        radius = 0.4 + 0.55 * (share if grows_right else 1 - share)
        shapes += [circle(float(x), float(y), radius, "primary") for y in np.arange(y0 + 1, y1 + 0.5, 2.0)]
    return _group(area, shapes)


def star(area: Box, rng: np.random.Generator) -> list[Element]:
    """A burst as in comics, with a smaller one of the accent in it."""
    x0, y0, x1, y1 = _inset(area)
    cy = (y0 + y1) / 2
    height, width = (y1 - y0) / 2 + 0.5 * MARGIN, 4.0
    cx = _aligned(x0, x1, 2 * width, pick(rng, ("left", "center", "right"))) + width
    shapes = [_burst(cx, cy, width, height, "primary"), _burst(cx, cy, 0.5 * width, 0.5 * height, "accent")]
    return _group((cx - width, cy - height, cx + width, cy + height), shapes)


def _burst(cx: float, cy: float, width: float, height: float, role: str) -> Shape:
    points: list[Point] = []
    for k in range(24):
        reach = 1.0 if k % 2 == 0 else 0.68
        angle = 2 * math.pi * k / 24
        points.append((cx + reach * width * math.cos(angle), cy + reach * height * math.sin(angle)))
    return polygon(points, role)


def rings(area: Box, rng: np.random.Generator) -> list[Element]:
    x0, y0, x1, y1 = area
    cx, cy = pick(rng, (0.25, 0.5, 0.75)) * (x0 + x1), (y0 + y1) / 2
    roles = ("primary", "background", "accent", "background")
    count = 6
    shapes = [circle(cx, cy, 2.0 * (count - k), roles[k % 4]) for k in range(count)]
    return _group(area, shapes)


def waves(area: Box, rng: np.random.Generator) -> list[Element]:
    x0, y0, x1, y1 = area
    xs = np.linspace(x0, x1, 49)
    swing = np.sin(2 * math.pi * xs / 8)
    shapes = []
    for number, y in enumerate(np.arange(y0 - 2, y1 + 1, 4.0)):
        upper = [(float(x), float(y + dy)) for x, dy in zip(xs, swing, strict=True)]
        shapes.append(polygon(upper + [(x, py + 2.0) for x, py in reversed(upper)], ("primary", "accent")[number % 2]))
    return _group(area, shapes)


def blocks(area: Box, rng: np.random.Generator) -> list[Element]:
    """A large rectangle, and a smaller one of the accent beside it."""
    x0, y0, x1, y1 = area
    width, height = x1 - x0, y1 - y0
    # The rectangles are narrow, so that the background remains the most frequent colour of the poster.
    wide, side = math.floor(0.4 * width), math.floor(0.3 * width)
    split = y0 + 2 * math.floor(height / 4)
    big_left = rng.random() < 0.5
    left = x0 if big_left else x1 - wide
    beside = x0 + wide + 2 if big_left else x1 - wide - 2 - side
    return [
        _single(rectangle(left, y0, left + wide, y1, "primary")),
        _single(rectangle(beside, split, beside + side, y1, "accent")),
    ]


def steps(area: Box, rng: np.random.Generator) -> list[Element]:
    x0, y0, x1, y1 = area
    rises_right = rng.random() < 0.5
    count = math.floor((x1 - x0) / 2)
    shapes = []
    for k in range(count):
        share = (k + 1 if rises_right else count - k) / count
        role = "accent" if share == 1.0 else "primary"
        shapes.append(rectangle(x0 + 2 * k, y1 - round(0.85 * share * (y1 - y0)), x0 + 2 * k + 2, y1, role))
    return _group(area, shapes)


def stripes(area: Box, rng: np.random.Generator) -> list[Element]:
    x0, y0, x1, y1 = area
    shapes = []
    for number, x in enumerate(np.arange(x0, x1, 2.0)):
        shapes.append(rectangle(float(x), y0, float(x) + 1, y1, ("primary", "accent")[number % 2]))
    return _group(area, shapes)


def arch(area: Box, rng: np.random.Generator) -> list[Element]:
    """An arch, with a smaller one of the accent in it."""
    x0, y0, x1, y1 = _inset(area)
    width = 4.0 if y1 - y0 < 6 else 8.0
    left = _aligned(x0, x1, width, pick(rng, ("left", "center", "right")))
    shapes: list[Shape] = []
    for inset, role in ((0.0, "primary"), (1.0, "background"), (1.5, "accent")):
        radius, cx = width / 2 - inset, left + width / 2
        top = y0 + inset + radius
        shapes += [circle(cx, top, radius, role), rectangle(cx - radius, top, cx + radius, y1, role)]
    return _group((left, y0, left + width, y1), shapes)


MOTIFS: dict[str, Motif] = {
    "one circle": circles(1),
    "two circles": circles(2),
    "three circles": circles(3),
    "one dot": lone_shape("ellipse"),
    "one square": lone_shape("rectangle"),
    "one wedge": wedge,
    "diagonal bars": diagonal_bars,
    "rays": rays,
    "a fan": fan,
    "dots": halftone_dots,
    "a star": star,
    "rings": rings,
    "waves": waves,
    "blocks": blocks,
    "steps": steps,
    "stripes": stripes,
    "an arch": arch,
}
