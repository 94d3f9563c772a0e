"""The brief of a poster: its style, colours and contents, drawn at random from (seed, index) before the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pipelines.common.poster_domain import COLORS, STYLES, TITLE_POSITIONS, hex_color

Item = TypeVar("Item")

MAX_PICTURES = 3
PICTURE_COUNT_WEIGHTS = (0.25, 0.3, 0.25, 0.2)

PRIMARIES_ON = {
    "cream": ("red", "blue", "green", "orange", "teal", "purple"),
    "black": ("red", "yellow", "teal", "orange", "green"),
    "red": ("black", "yellow", "teal"),
    "blue": ("yellow", "orange", "pink", "red"),
    "yellow": ("red", "blue", "green", "purple"),
    "green": ("yellow", "pink", "orange"),
    "pink": ("red", "blue", "green", "purple"),
    "teal": ("cream", "red", "purple", "yellow"),
    "orange": ("blue", "purple", "cream"),
    "purple": ("yellow", "pink", "orange", "teal"),
}
"""Background -> main colours that a designer would combine with it: they contrast with the background and its ink."""

BACKGROUND_WEIGHTS = {"cream": 4.0, "black": 2.0, "yellow": 2.0}
"""Weights of the backgrounds that are more frequent than the others (1.0)."""

CREAM_INKED = frozenset({"black", "red", "blue", "green", "purple"})
"""Dark backgrounds, whose ink is cream; that of the others is black. A shape never has the colour of the ink."""

WARMTH_OF = {
    "cream": 0.6, "black": 0.4, "red": 1.0, "orange": 0.95, "yellow": 0.85,
    "green": 0.25, "teal": 0.1, "blue": 0.0, "purple": 0.35, "pink": 0.75,
}  # fmt: skip


@dataclass(frozen=True)
class StyleCharacter:
    """The properties of a style that a brief is drawn from."""

    words: tuple[str, ...]
    """Title words: few and short, so that a small model can learn to spell them."""
    motifs: tuple[str, ...]
    energy: float
    formality: float
    body_weights: tuple[float, float, float]
    """Weights of 0, 1 and 2 blocks of small text. A style has small text either always or never (two or more
    pictures leave no room for it): the place of the motif depends on it, and captions do not mention it."""


CHARACTERS = {
    "swiss": StyleCharacter(
        ("FORM", "TYPE", "EXPO"), ("one circle", "two circles", "three circles"), 0.5, 0.75, (0, 3, 2)
    ),
    "minimalist": StyleCharacter(("ZERO", "CALM", "LESS"), ("one dot", "one square"), 0.1, 0.7, (0, 1, 0)),
    "constructivist": StyleCharacter(("WORK", "FILM", "IRON"), ("one wedge", "diagonal bars"), 0.85, 0.5, (0, 1, 0)),
    "art_deco": StyleCharacter(("JAZZ", "GALA", "LIDO"), ("rays", "a fan"), 0.55, 0.9, (1, 0, 0)),
    "pop": StyleCharacter(("WOW!", "ZOOM", "BANG"), ("dots", "a star"), 0.95, 0.15, (1, 0, 0)),
    "psychedelic": StyleCharacter(("LOVE", "SOUL", "MOON"), ("rings", "waves"), 0.9, 0.05, (1, 0, 0)),
    "brutalist": StyleCharacter(("MASS", "SLAB", "CORE"), ("blocks", "steps"), 0.65, 0.35, (0, 2, 1)),
    "editorial": StyleCharacter(("MODE", "VIEW", "CITY"), ("stripes", "an arch"), 0.3, 0.85, (0, 1, 3)),
}


@dataclass(frozen=True)
class PosterBrief:
    """The brief of one poster. Colours are names of COLORS; energy, formality and warmth are in [0, 1]."""

    style: str
    background: str
    primary: str
    accent: str | None
    ink: str
    pictures: int
    title_position: str
    motif: str
    body_blocks: int
    title: str
    energy: float
    formality: float
    warmth: float

    @property
    def palette_names(self) -> list[str]:
        names = [self.background, self.primary, self.accent, self.ink]
        return [name for name in names if name is not None]

    @property
    def palette(self) -> list[str]:
        return [hex_color(COLORS[name]) for name in self.palette_names]

    @property
    def text_blocks(self) -> int:
        """Number of text blocks: the title and the blocks of small text."""
        return 1 + self.body_blocks

    def color_of(self, role: str) -> tuple[int, int, int]:
        """Return the RGB colour of a role. Without an accent, secondary and accent have the primary colour."""
        name = {"background": self.background, "surface": self.ink, "primary": self.primary, "ink": self.ink}.get(role)
        return COLORS[name or self.accent or self.primary]

    def seen_role(self, role: str) -> str:
        """Return the role that is visible in the poster: without an accent, the role "accent" appears as "primary"."""
        return "primary" if role == "accent" and self.accent is None else role


def pick(rng: np.random.Generator, items: Sequence[Item], weights: Sequence[float] | None = None) -> Item:
    """Draw one of `items` by weight. This takes exactly one number from `rng`."""
    cumulative = np.cumsum(np.ones(len(items)) if weights is None else np.asarray(weights, dtype=np.float64))
    position = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return items[min(position, len(items) - 1)]


def draw_brief(rng: np.random.Generator) -> PosterBrief:
    """Draw a brief whose fields are consistent: contrasting colours, and motif and title from the style."""
    style = pick(rng, STYLES)
    character = CHARACTERS[style]
    background, primary, accent, ink = _draw_colors(rng)
    pictures = pick(rng, range(MAX_PICTURES + 1), PICTURE_COUNT_WEIGHTS)
    body_blocks = pick(rng, (0, 1, 2), character.body_weights)
    names = [background, primary] + ([accent] if accent else [])
    warmth = 0.5 * WARMTH_OF[background] + 0.5 * float(np.mean([WARMTH_OF[name] for name in names[1:]]))
    return PosterBrief(
        style=style,
        background=background,
        primary=primary,
        accent=accent,
        ink=ink,
        pictures=pictures,
        title_position=pick(rng, TITLE_POSITIONS),
        motif=pick(rng, character.motifs),
        body_blocks=0 if pictures >= 2 else body_blocks,
        title=pick(rng, character.words),
        energy=_near(rng, character.energy + (0.1 if accent else 0.0)),
        formality=_near(rng, character.formality),
        warmth=round(warmth, 3),
    )


def _draw_colors(rng: np.random.Generator) -> tuple[str, str, str | None, str]:
    """Draw distinct colours for background, primary, accent (None in half of the posters) and ink."""
    grounds = list(PRIMARIES_ON)
    background = pick(rng, grounds, [BACKGROUND_WEIGHTS.get(name, 1.0) for name in grounds])
    ink = "cream" if background in CREAM_INKED else "black"
    primaries = [name for name in PRIMARIES_ON[background] if name != ink]
    primary = pick(rng, primaries)
    others = [name for name in primaries if name != primary]
    accent = pick(rng, others)
    return background, primary, accent if rng.random() < 0.5 else None, ink


def _near(rng: np.random.Generator, center: float) -> float:
    return round(float(np.clip(center + 0.1 * (rng.random() - 0.5), 0.0, 1.0)), 3)
