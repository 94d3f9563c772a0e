"""DesignBrief (V_Meta): describes in numbers and names how a poster should look. Any field may be left open.

Shapes: B briefs.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .poster_domain import (
    COLORS,
    COUNTS,
    GRAMMAR,
    MAX_PALETTE_COLORS,
    MAX_PICTURES,
    MAX_TEXT_BLOCKS,
    STYLES,
    color_distance,
    hex_color,
    nearest_color_name,
    rgb_color,
    style_words,
)

NUMBERS = ("energy", "formality", "warmth", *GRAMMAR)
"""Fields that are numbers in [0, 1], in the order of `brief_tensors`."""

MAX_COUNTS = {"text_blocks": MAX_TEXT_BLOCKS, "pictures": MAX_PICTURES}

STYLE_MOODS = {
    "swiss": (0.5, 0.75),
    "minimalist": (0.1, 0.7),
    "constructivist": (0.85, 0.5),
    "art_deco": (0.55, 0.9),
    "pop": (0.95, 0.15),
    "psychedelic": (0.9, 0.05),
    "brutalist": (0.65, 0.35),
    "editorial": (0.3, 0.85),
}
"""Energy and formality of each style, for random briefs."""

READABLE_DISTANCE = 150
"""Smallest RGB distance at which a shape stands out from its background."""


@dataclass(frozen=True)
class DesignBrief:
    """Requirements for a poster; None leaves a field open.

    Args:
        style: one of STYLES; "Art Deco" and "art-deco" are read as "art_deco".
        energy, formality, warmth: numbers in [0, 1].
        palette: 1 to 5 colours in the order background, primary, accent, ink: '#rgb', '#rrggbb' or names in COLORS, as
            a list or separated by commas. It is stored as a tuple of '#rrggbb'. A palette with fewer colours than the
            poster leaves the others open.
        text_blocks: number of text blocks, 0 to 3, including the title.
        pictures: number of pictures, 0 to 3.
        balance, ..., image_share: numbers of the layout's grammar (GRAMMAR), in [0, 1].

    Raises:
        ValueError: a value is not allowed; the message names the field, its value, and the allowed values.
    """

    style: str | None = None
    energy: float | None = None
    formality: float | None = None
    warmth: float | None = None
    palette: Sequence[str] | str | None = None
    text_blocks: int | None = None
    pictures: int | None = None
    balance: float | None = None
    equilibrium: float | None = None
    symmetry: float | None = None
    regularity: float | None = None
    rhythm: float | None = None
    density: float | None = None
    hierarchy_contrast: float | None = None
    image_share: float | None = None

    def __post_init__(self) -> None:
        checked = {"style": _style, "palette": _palette}
        checked |= dict.fromkeys(NUMBERS, _number) | dict.fromkeys(COUNTS, _count)
        for name, check in checked.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check(name, value))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DesignBrief:
        """Create a brief from field names and values, such as those of a YAML file.

        Raises:
            ValueError: a field is unknown (the message suggests the nearest known one), or a value is not allowed.
        """
        for name in values:
            if name not in FIELDS:
                raise ValueError(
                    f"a brief has no field {name!r}{_nearest(str(name), FIELDS)}; its fields are {', '.join(FIELDS)}"
                )
        return cls(**values)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> DesignBrief:
        """Create a brief from a row of a poster dataset; other columns are ignored, and missing fields stay open.

        Raises:
            ValueError: a value is not allowed.
        """
        return cls(**{name: row[name] for name in FIELDS if name in row})

    @classmethod
    def from_yaml(cls, path: str | Path) -> DesignBrief:
        """Create a brief from a YAML file of fields.

        Raises:
            ValueError: the file cannot be read, is not YAML, or has wrong fields; the message names the file.
        """
        import yaml

        quote = "colours are written in quotes ('#d33'), because # begins a comment"
        try:
            values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a text file"
            raise ValueError(f"the brief {path} cannot be read: {reason}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"the brief {path} is not valid YAML: {' '.join(str(error).split())}; {quote}") from None
        if not isinstance(values, Mapping):
            raise ValueError(f"the brief {path} must hold lines such as `style: swiss`, but holds {values!r}")
        if "palette" in values and not values["palette"]:
            raise ValueError(f"the brief {path}: palette is empty; {quote}")
        try:
            return cls.from_mapping(values)
        except ValueError as error:
            raise ValueError(f"the brief {path}: {error}") from None

    @classmethod
    def random(cls, seed: int) -> DesignBrief:
        """Return a random brief whose fields suit each other: colours that stand out, and a style with its mood.

        The grammar is left open, because random numbers might describe a layout that cannot exist.
        """
        rng = np.random.default_rng(seed)
        style = str(rng.choice(STYLES))
        palette = _random_palette(rng)
        pictures = int(rng.integers(MAX_PICTURES + 1))
        moods = [float(np.clip(mood + rng.uniform(-0.05, 0.05), 0, 1)) for mood in STYLE_MOODS[style]]
        return cls(
            style=style,
            energy=round(moods[0], 2),
            formality=round(moods[1], 2),
            warmth=round(float(np.mean([_warmth(COLORS[name]) for name in palette[:-1]])), 2),
            palette=palette,
            # Two or more pictures leave no room for small text.
            text_blocks=1 if pictures >= 2 else int(rng.integers(1, MAX_TEXT_BLOCKS + 1)),
            pictures=pictures,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not open, as plain values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}

    def to_yaml(self) -> str:
        """Return the brief as YAML, which `from_yaml` reads."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)

    def describe(self) -> str:
        """Describe the brief in one line, such as 'swiss, cream red black, 1 text, 2 pictures'.

        The numbers are given only if all other fields are open.
        """
        parts = [style_words(self.style)] if self.style else []
        if self.palette:
            parts.append(" ".join(nearest_color_name(rgb_color(color)) for color in self.palette))
        for name, word in (("text_blocks", "text"), ("pictures", "picture")):
            count = getattr(self, name)
            if count is not None:
                parts.append(f"{count} {word}{'' if count == 1 else 's'}")
        numbers = [f"{name} {getattr(self, name):.2g}" for name in NUMBERS if getattr(self, name) is not None]
        return ", ".join(parts or numbers) or "no brief"


FIELDS = tuple(field.name for field in dataclasses.fields(DesignBrief))


def brief_tensors(briefs: Sequence[DesignBrief], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Convert briefs to the inputs of a `DesignBriefEncoder`; an open field is 0, and False in its mask.

    Returns:
        style: B 1, int64, a position in STYLES.
        numbers: B 11, float32 in [0, 1], in the order of NUMBERS.
        counts: B 2, int64, in the order of COUNTS.
        palette: B 5 3, float32 in [0, 1].
        style_present, numbers_present, counts_present, palette_present: B 1, B 11, B 2, B 5, bool.
    """
    rows: dict[str, list[list[Any]]] = {
        "style": [[None if brief.style is None else STYLES.index(brief.style)] for brief in briefs],
        "numbers": [[getattr(brief, name) for name in NUMBERS] for brief in briefs],
        "counts": [[getattr(brief, name) for name in COUNTS] for brief in briefs],
        "palette": [_padded_palette(brief.palette or ()) for brief in briefs],
    }
    absent = {"style": 0, "numbers": 0.0, "counts": 0, "palette": (0.0, 0.0, 0.0)}
    tensors: dict[str, Tensor] = {}
    for name, values in rows.items():
        filled = [[absent[name] if value is None else value for value in row] for row in values]
        tensors[name] = torch.tensor(filled, device=device)
        present = [[value is not None for value in row] for row in values]
        tensors[f"{name}_present"] = torch.tensor(present, device=device)
    return tensors


def _padded_palette(palette: Sequence[str]) -> list[tuple[float, ...] | None]:
    """Return MAX_PALETTE_COLORS colours in [0, 1], with None for missing ones."""
    colors = [tuple(value / 255 for value in rgb_color(color)) for color in palette]
    return [*colors, *[None] * (MAX_PALETTE_COLORS - len(colors))]


def parse_color(text: Any) -> tuple[int, int, int]:
    """Convert '#d33', '#dd3333' or a name in COLORS to RGB in 0..255.

    Raises:
        ValueError: `text` is none of these.
    """
    word = text.strip().lower() if isinstance(text, str) else ""
    if word in COLORS:
        return COLORS[word]
    if re.fullmatch(r"#[0-9a-f]{3}", word):
        word = "#" + "".join(2 * digit for digit in word[1:])
    if re.fullmatch(r"#[0-9a-f]{6}", word):
        return rgb_color(word)
    raise ValueError(
        f"{text!r} is not a colour{_nearest(word, COLORS)}; write '#rgb', '#rrggbb' or one of {', '.join(COLORS)}"
    )


def _style(name: str, value: Any) -> str:
    word = re.sub(r"[\s-]+", "_", value.strip().lower()) if isinstance(value, str) else ""
    if word not in STYLES:
        raise ValueError(f"{name} must be one of {', '.join(STYLES)}, but is {value!r}{_nearest(word, STYLES)}")
    return word


def _palette(name: str, value: Any) -> tuple[str, ...]:
    colors = value.split(",") if isinstance(value, str) else value
    if not isinstance(colors, Iterable) or not 1 <= len(colors := list(colors)) <= MAX_PALETTE_COLORS:
        raise ValueError(f"{name} must be 1 to {MAX_PALETTE_COLORS} colours, but is {value!r}")
    try:
        return tuple(hex_color(parse_color(color)) for color in colors)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], but is {value!r}")
    return round(float(value), 6)  # so that the 0.9 of a float32 column is equal to 0.9


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) <= MAX_COUNTS[name]:
        raise ValueError(f"{name} must be a whole number from 0 to {MAX_COUNTS[name]}, but is {value!r}")
    return int(value)


def _nearest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def _random_palette(rng: np.random.Generator) -> list[str]:
    """Return names of background, primary, accent (in half of the palettes) and ink, all readable on the background."""
    background = str(rng.choice(list(COLORS)))
    # Ink is only for letters: the darkest or the lightest colour, whichever stands out more.
    ink = max(("black", "cream"), key=lambda name: _apart(background, name))
    others = [name for name in COLORS if name != ink and _apart(background, name) >= READABLE_DISTANCE]
    rng.shuffle(others)
    return [background, *others[: int(rng.integers(1, 3))], ink]


def _apart(first: str, second: str) -> float:
    return float(color_distance(np.array(COLORS[first]), np.array(COLORS[second])))


def _warmth(rgb: tuple[int, int, int]) -> float:
    """Return the warmth of a colour in [0, 1]: 0 for pure blue, 1 for pure red."""
    return 0.5 + (rgb[0] - rgb[2]) / 510
