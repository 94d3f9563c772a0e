"""What a poster is made of: elements in boxes, and the shapes in them.

Units: the page is a square of UNITS × UNITS grid units (u), x to the right, y downwards; at 64 px a unit is 4 px, so
that boxes on whole units keep to the patches of a small autoencoder. Boxes are (x0, y0, x1, y1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

UNITS = 16

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """One flat shape: a rectangle or an ellipse given by its two corners, or a polygon by its points (u)."""

    kind: str
    points: tuple[Point, ...]
    role: str


@dataclass(frozen=True)
class Title:
    """A word set in one line that fills its element's box."""

    word: str
    font: str
    inverted: bool
    """Letters in the background's colour on a band of ink across the page, rather than ink on the background."""


@dataclass(frozen=True)
class TextLines:
    """Small text: one line per width (a share of the box's width), one unit apart."""

    widths: tuple[float, ...]
    align: str
    ink_share: float = 1.0
    """How much of its colour is ink; the rest is the background's."""


@dataclass(frozen=True)
class Scene:
    """A picture: what it shows, the seed of its details, and how it is printed."""

    subject: str
    seed: int
    mount: str = "keyline"
    """"keyline": in a frame of ink; "shadow" and "bare" have none. All but "bare" throw a shadow, if not `plain`."""
    duotone: tuple[str, str] | None = None
    """The roles whose colours are its darkest and its lightest tone; None for colours of its own."""


@dataclass(frozen=True)
class Element:
    """A box with something in it; shapes are clipped to the box.

    `hierarchy` in [0, 1]: how strongly it leads the eye; later elements lie above earlier ones.
    """

    kind: str
    role: str
    hierarchy: float
    box: Box
    content: Title | TextLines | Scene | tuple[Shape, ...]
    opacity: float = 1.0
    """Under 1 for shapes printed over what lies below them."""
    angle: float = 0.0
    """Degrees, counterclockwise, by which text is turned about the middle of `box` (the box before it is turned)."""

    @property
    def center(self) -> Point:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def bounds(self) -> Box:
        """The smallest upright box around the element as it stands on the page."""
        if not self.angle:
            return self.box
        xs, ys = zip(*turned(corners_of(self.box), self.center, self.angle), strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def corners_of(box: Box) -> list[Point]:
    x0, y0, x1, y1 = box
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def turned(points: list[Point], center: Point, degrees: float) -> list[Point]:
    """`points` turned about `center`, counterclockwise as one looks at the page (y runs downwards)."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    (cx, cy), moved = center, []
    for x, y in points:
        dx, dy = x - cx, y - cy
        moved.append((cx + dx * cosine + dy * sine, cy - dx * sine + dy * cosine))
    return moved


def rectangle(x0: float, y0: float, x1: float, y1: float, role: str) -> Shape:
    return Shape("rectangle", ((x0, y0), (x1, y1)), role)


def circle(cx: float, cy: float, radius: float, role: str) -> Shape:
    return Shape("ellipse", ((cx - radius, cy - radius), (cx + radius, cy + radius)), role)


def polygon(points: list[Point], role: str) -> Shape:
    return Shape("polygon", tuple(points), role)
