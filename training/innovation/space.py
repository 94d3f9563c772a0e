"""The space that is searched: each point of the unit cube is a design brief, and the number of an initial noise.

N briefs, n dimensions. A coordinate outside of [0, 1] is reflected at its bounds, so that a search needs no bounds: a
step beyond 1 comes back below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.common.design_brief import FIELDS, NUMBERS, READABLE_DISTANCE, STYLE_MOODS, DesignBrief
from pipelines.common.poster_domain import COLORS, GRAMMAR, MAX_PICTURES, MAX_TEXT_BLOCKS, color_distance
from pipelines.tools.cli import UserError, nearest

STYLE_AXES = tuple(name for name in NUMBERS if name not in GRAMMAR)
MEASURES = (*GRAMMAR, *STYLE_AXES)
"""What may span an archive: grammar numbers, which are read from the poster, and the style axes of its brief"""

# Along one axis, a small step should be a small change of the poster: styles are in the order of their energy.
_STYLES = sorted(STYLE_MOODS, key=lambda style: STYLE_MOODS[style])
_PALETTE_AXES = ("background", "primary", "accent")
_NOISE = "noise"


@dataclass(frozen=True)
class BriefSpace:
    """Briefs with some fields free and others fixed. A field that is neither is left open.

    Args:
        free: names of the fields that the search chooses.
        fixed: a brief with the fields that it may not change.
        noises: number of initial noises that the search chooses between; 1 gives all posters the same noise.

    Raises:
        UserError: no field is free, or one does not exist.
    """

    free: tuple[str, ...]
    fixed: DesignBrief = DesignBrief()
    noises: int = 1

    def __post_init__(self) -> None:
        for name in self.free:
            if name not in FIELDS:
                raise UserError(f"--fields: a brief has no field {name!r}{nearest(name, FIELDS)}")
        given = self.fixed.to_dict()
        left = tuple(name for name in FIELDS if name in self.free and name not in given)
        if not left:
            named = ", ".join(self.free) or "none"
            why = f"--brief gives all of them ({', '.join(given)})" if self.free else "none are named"
            raise UserError(
                f"the search has no free field: --fields is {named}, and {why}; add fields to --fields, or leave them "
                "out of --brief"
            )
        object.__setattr__(self, "free", left)

    @property
    def axes(self) -> list[str]:
        """The name of each dimension."""
        names: list[str] = []
        for field in self.free:
            names += [f"palette_{part}" for part in _PALETTE_AXES] if field == "palette" else [field]
        return [*names, *([_NOISE] if self.noises > 1 else [])]

    def describe(self) -> str:
        """Return in one line what determines the brief of a point; equal spaces have equal descriptions."""
        return f"{' '.join(self.axes)}, {self.noises} noises, fixed: {self.fixed.to_dict()}"

    def decode(self, points: np.ndarray) -> tuple[list[DesignBrief], list[int]]:
        """Return the brief and the number of the initial noise of each point.

        Args:
            points: N × n
        """
        columns = dict(zip(self.axes, reflected(points).T, strict=True))
        briefs = [
            self._brief({name: float(values[row]) for name, values in columns.items()}) for row in range(len(points))
        ]
        chosen = columns.get(_NOISE, np.zeros(len(points)))
        return briefs, [_choice(range(self.noises), float(value)) for value in chosen]

    def _brief(self, point: Mapping[str, float]) -> DesignBrief:
        fields: dict[str, Any] = {}
        for name in self.free:
            if name == "palette":
                fields[name] = _palette(*(point[f"palette_{part}"] for part in _PALETTE_AXES))
            else:
                fields[name] = _VALUES.get(name, float)(point[name])
        return DesignBrief(**{**fields, **self.fixed.to_dict()})


def reflected(points: np.ndarray) -> np.ndarray:
    """Return points inside of the unit cube: coordinates beyond its faces are mirrored at them, again and again."""
    return 1.0 - np.abs(1.0 - np.mod(points, 2.0))


def check_measures(measures: Sequence[str], space: BriefSpace) -> None:
    """Raise UserError unless these are two to four different measures whose values vary in this space."""
    for name in measures:
        if name not in MEASURES:
            raise UserError(
                f"--measures: {name!r} is unknown{nearest(name, MEASURES)}; choose from {', '.join(MEASURES)}"
            )
    if not 2 <= len(measures) <= 4 or len(set(measures)) < len(measures):
        raise UserError(f"--measures is {','.join(measures)}; it must be two to four different names")
    for name in measures:
        if name in STYLE_AXES and name not in space.free:
            raise UserError(
                f"--measures: {name} is the value in the brief, which is the same for all posters because it is not "
                f"free; add it to --fields and leave it out of --brief, or choose another measure"
            )


def _choice(items: Sequence[Any], coordinate: float) -> Any:
    return items[min(int(coordinate * len(items)), len(items) - 1)]


def _palette(background: float, primary: float, accent: float) -> list[str]:
    """Return names of background, primary, accent (for half of the coordinates) and ink.

    All of them stand out from the background, as in the posters that decoders are trained on.
    """
    ground = _choice(list(COLORS), background)
    ink = max(("black", "cream"), key=lambda name: _apart(ground, name))
    others = [name for name in COLORS if name != ink and _apart(ground, name) >= READABLE_DISTANCE]
    main = _choice(others, primary)
    rest = [name for name in others if name != main]
    second = [_choice(rest, 2 * accent - 1)] if accent >= 0.5 and rest else []
    return [ground, main, *second, ink]


def _apart(first: str, second: str) -> float:
    return float(color_distance(np.array(COLORS[first]), np.array(COLORS[second])))


_VALUES: dict[str, Callable[[float], Any]] = {
    "style": lambda coordinate: _choice(_STYLES, coordinate),
    "text_blocks": lambda coordinate: _choice(range(1, MAX_TEXT_BLOCKS + 1), coordinate),  # 1: every poster has a title
    "pictures": lambda coordinate: _choice(range(MAX_PICTURES + 1), coordinate),
}
