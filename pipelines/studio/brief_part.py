"""The part of a tab that describes a poster: style, palette, numbers of elements, mood and layout."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import gradio as gr

from ..common.design_brief import MAX_COUNTS, NUMBERS, DesignBrief, parse_color
from ..common.poster_domain import MAX_PALETTE_COLORS, STYLES, hex_color, style_words
from ..tools.cli import UserError
from ..tools.repeating import Recipe, brief_of, brief_text
from ..tools.resources import BRIEFS, shipped_files, shipped_path
from .bounds import MOST_SEED, plainly, whole
from .parts import Made, Part

OPEN = "chosen by the model"
ROLES = ("Background", "Primary", "Accent", "Ink", "Fifth colour")
COLORS = ("#f6ecd6", "#d0202a", "#1e56be", "#1c1a1e", "#facc2a")
COUNT_LABELS = {"text_blocks": "Text blocks", "pictures": "Pictures"}


class Brief(Part):
    """Style, palette and numbers of a poster; what is not set is chosen by the model."""

    names = ("brief",)

    def __init__(self) -> None:
        styles = [(OPEN, OPEN), *((style_words(style), style) for style in STYLES)]
        self.style = gr.Dropdown(styles, value=OPEN, label="Style")
        self.number_of_colors = gr.Slider(
            0, MAX_PALETTE_COLORS, 0, step=1, label="Number of colours", info="0 leaves the palette to the model"
        )
        with gr.Row():
            self.colors = [
                gr.ColorPicker(color, label=role, min_width=90) for role, color in zip(ROLES, COLORS, strict=True)
            ]
        with gr.Row():
            self.counts = [
                gr.Slider(-1, most, -1, step=1, label=COUNT_LABELS[name], info="-1 leaves it to the model")
                for name, most in MAX_COUNTS.items()
            ]
        with gr.Accordion("Mood and layout", open=False):
            words = [(name.replace("_", " "), name) for name in NUMBERS]
            self.used = gr.CheckboxGroup(words, value=[], label="Which of these numbers the brief sets")
            self.numbers = [gr.Slider(0, 1, 0.5, step=0.01, label=words_of(name)) for name in NUMBERS]
        self.components = [
            self.style, self.number_of_colors, *self.colors, *self.counts, self.used, *self.numbers
        ]  # fmt: skip
        gr.Button("Random brief", size="sm").click(
            plainly(lambda: self.values_of(DesignBrief.random(random.randrange(MOST_SEED)))),
            None, self.components, queue=False,
        )  # fmt: skip
        files = [shipped_path(name) for name in shipped_files() if name.startswith(f"{BRIEFS}/")]
        if files:
            rows = [self.values_of(DesignBrief.from_yaml(file)) for file in files]
            gr.Examples(rows, self.components, label="Example briefs", example_labels=[file.stem for file in files])

    def values_of(self, brief: DesignBrief) -> list[Any]:
        """Return the values of the components for a brief."""
        palette = list(brief.palette or ())
        counts = [getattr(brief, name) for name in MAX_COUNTS]
        numbers = {name: getattr(brief, name) for name in NUMBERS}
        return [
            brief.style or OPEN,
            len(palette),
            *(palette + list(COLORS)[len(palette) :]),
            *(-1 if count is None else count for count in counts),
            [name for name, value in numbers.items() if value is not None],
            *(0.5 if value is None else value for value in numbers.values()),
        ]

    def brief(self, values: Sequence[Any]) -> DesignBrief:
        """Return the brief that the values of the components describe. Raises UserError."""
        style, number_of_colors, *others = values
        colors, others = others[:MAX_PALETTE_COLORS], others[MAX_PALETTE_COLORS:]
        counts, used, numbers = others[: len(MAX_COUNTS)], others[len(MAX_COUNTS)], others[len(MAX_COUNTS) + 1 :]
        number = whole("the number of colours", number_of_colors, 0, MAX_PALETTE_COLORS)
        fields: dict[str, Any] = {} if style in (None, OPEN) else {"style": style}
        try:
            if number:
                fields["palette"] = [hex_color(_rgb(color)) for color in colors[:number]]
            fields |= {name: int(count) for name, count in zip(MAX_COUNTS, counts) if count is not None and count >= 0}
            fields |= {name: float(value) for name, value in zip(NUMBERS, numbers) if name in (used or [])}
            return DesignBrief.from_mapping(fields)
        except (ValueError, TypeError) as error:
            name, space, rest = str(error).partition(" ")  # such as "text_blocks must be a whole number"
            labels = COUNT_LABELS | {number: words_of(number) for number in NUMBERS}
            name = f"'{labels[name]}'" if name in labels else name
            raise UserError(f"the brief cannot be used: {name}{space}{rest}") from error

    def made(self, values: Sequence[Any], count: int) -> Made:
        brief = self.brief(values)
        text = brief_text(brief)
        return Made({"briefs": [brief] * count}, {"brief": text} if text else {})

    def repeated(self, recipe: Recipe) -> list[Any]:
        return self.values_of(brief_of(recipe.texts.get("brief", "")))


def words_of(name: str) -> str:
    """Return the name of a field as a label: 'Image share' for `image_share`."""
    return name.replace("_", " ").capitalize()


def _rgb(color: str) -> tuple[int, int, int]:
    """Convert a colour of a colour picker: #rrggbb, or rgb(a) with numbers that may have decimals."""
    if color.startswith("rgb"):
        parts = color[color.index("(") + 1 : color.rindex(")")].split(",")
        red, green, blue = (min(255, max(0, round(float(part)))) for part in parts[:3])
        return red, green, blue
    return parse_color(color)
