"""Names and colours of the poster domain, shared by the code that draws, generates and analyses posters.

This file holds only names, numbers and small pure functions, because published pipelines need it too.

Colours are RGB triples in 0..255. Any two colours of the domain are at least 80 apart (Euclidean distance), so that the
nearest name of a slightly wrong colour is still the name of the intended colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

STYLES = (
    "swiss",
    "minimalist",
    "constructivist",
    "art_deco",
    "pop",
    "psychedelic",
    "brutalist",
    "editorial",
)

COLORS: dict[str, tuple[int, int, int]] = {
    "cream": (246, 236, 214),
    "black": (28, 26, 30),
    "red": (208, 32, 42),
    "orange": (240, 116, 30),
    "yellow": (250, 204, 42),
    "green": (30, 130, 84),
    "teal": (40, 178, 168),
    "blue": (30, 86, 190),
    "purple": (116, 52, 148),
    "pink": (244, 150, 180),
}
"""Name -> RGB. Any two are more than 80 apart."""

COLOR_ROLES = ("background", "surface", "primary", "secondary", "accent", "ink")
"""What a colour is used for; a role's position here is its class id in the column `color_role`."""

TITLE_POSITIONS = ("top", "middle", "bottom")

ELEMENT_KINDS = ("title", "text", "picture", "shape")

F_TENSOR_CHANNELS = ("text_mask", "image_mask", "color_role", "hierarchy")
"""Text boxes {0,1}, pictures {0,1}, position in COLOR_ROLES, and how strongly the element leads the eye [0,1]."""

GRAMMAR = (
    "balance",
    "equilibrium",
    "symmetry",
    "regularity",
    "rhythm",
    "density",
    "hierarchy_contrast",
    "image_share",
)
"""V_Grammar: numbers in [0, 1] that describe a layout, computed from the boxes of its elements."""

COUNTS = ("text_blocks", "pictures")
"""Numbers of text blocks (including the title) and of pictures on a poster."""

MAX_TEXT_BLOCKS, MAX_PICTURES = 3, 3
MAX_PALETTE_COLORS = 5

PICTURE_TINT = (0.86, 1.0, 1.18)
"""`plain` posters have pictures in cool monochrome: the RGB colour is a grey tone times this tint. No mixture of the
palette's black and cream (which is warm) has such a colour, so a blurred title cannot be mistaken for a picture."""


def color_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the Euclidean RGB distance over the last axis, in units of 0..255; the other axes broadcast."""
    difference = np.asarray(first, dtype=np.float32) - np.asarray(second, dtype=np.float32)
    return np.sqrt((difference**2).sum(axis=-1))


def nearest_color_name(rgb: Sequence[float] | np.ndarray, names: Iterable[str] | None = None) -> str:
    """Return the name in COLORS (or among `names`) whose colour is nearest to `rgb` (0..255).

    Raises:
        KeyError: one of `names` is not in COLORS.
    """
    known = list(COLORS) if names is None else list(names)
    table = np.array([COLORS[name] for name in known], dtype=np.float32)
    return known[int(color_distance(np.asarray(rgb, dtype=np.float32), table).argmin())]


def hex_color(rgb: Sequence[int]) -> str:
    """Convert (208, 32, 42) to '#d0202a'."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def rgb_color(hex_code: str) -> tuple[int, int, int]:
    """Convert '#d0202a' to (208, 32, 42). Raises ValueError for any other form."""
    digits = hex_code.removeprefix("#")
    if len(digits) != 6:
        raise ValueError(f"a colour must be written as #rrggbb, but is {hex_code!r}")
    return int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16)


def style_words(style: str) -> str:
    """Return a style as it is written in captions: 'art deco' for 'art_deco'."""
    return style.replace("_", " ")
