"""The elements of a poster, their boxes, and the shapes in them.

Units: the page is a square of UNITS × UNITS grid units (u), with x to the right and y downwards. At 64 px a unit is
4 px, so that boxes on whole units align with the patches of a small autoencoder. Boxes are (x0, y0, x1, y1).
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
    """A word in one line that fills the box of its element."""

    word: str
    font: str
    inverted: bool
    """Whether the letters have the background's colour on a band of ink, instead of ink on the background."""


@dataclass(frozen=True)
class TextLines:
    """Small text: one line per width (a fraction of the width of the box), one unit apart."""

    widths: tuple[float, ...]
    align: str
    ink_share: float = 1.0
    """Fraction of ink in its colour; the rest is the background's colour."""


@dataclass(frozen=True)
class Scene:
    """The content of a picture: its subject, the seed of its details, and how it is printed."""

    subject: str
    seed: int
    mount: str = "keyline"
    """"keyline" (with a frame of ink), "shadow" or "bare". Except in `plain` posters, the first two cast a shadow."""
    duotone: tuple[str, str] | None = None
    """Colour roles of its darkest and its lightest tone; None if it has colours of its own."""


@dataclass(frozen=True)
class Element:
    """A box with its content; shapes are clipped to the box. Later elements cover earlier ones.

    `hierarchy` in [0, 1] is how strongly the element attracts the eye.
    """

    kind: str
    role: str
    hierarchy: float
    box: Box
    content: Title | TextLines | Scene | tuple[Shape, ...]
    opacity: float = 1.0
    """Below 1 for transparent shapes."""
    angle: float = 0.0
    """Counterclockwise rotation of text about the centre of `box`, in degrees; `box` is the box before the rotation."""

    @property
    def center(self) -> Point:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def bounds(self) -> Box:
        """The smallest axis-aligned box around the element after its rotation."""
        if not self.angle:
            return self.box
        xs, ys = zip(*turned(corners_of(self.box), self.center, self.angle), strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def corners_of(box: Box) -> list[Point]:
    x0, y0, x1, y1 = box
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def turned(points: list[Point], center: Point, degrees: float) -> list[Point]:
    """Rotate `points` about `center`, counterclockwise as seen on the page (y points downwards)."""
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
