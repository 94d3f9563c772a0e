"""The tab that analyses a poster: its text, images, colour roles, visual hierarchy and design grammar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..tools.cli import UserError
from ..tools.layout_report import describe, sheet
from .bounds import plainly
from .components import picture
from .examples import image_examples
from .generating import ON_MODELS
from .models import Model

MOST_SIDE = 1024
"""Posters are scaled down to this longer side before they are analysed; the model reads far smaller ones."""


def add_analysis_tab(model: Model, examples: list[str]) -> None:
    """Add the controls that analyse a poster."""

    def analyse(image: Image.Image | None) -> tuple[Any, Any]:
        if image is None:
            raise UserError("no image is chosen; upload a poster first")
        poster = image.copy()
        poster.thumbnail((MOST_SIDE, MOST_SIDE))
        with model.used() as pipeline:
            reading = pipeline(poster)
        facts = describe(poster, reading, Path("poster"))
        return sheet(poster, reading, facts), rows_of(facts)

    image = picture("Poster to analyse")
    image_examples(examples, image, "Example posters")
    button = gr.Button("Analyse", variant="primary")
    report = gr.Image(
        label="Report", format="png", interactive=False, buttons=["download", "fullscreen"], elem_classes="below-label"
    )
    table = gr.Dataframe(headers=["value", "result"], label="Values", interactive=False)
    button.click(plainly(analyse), image, [report, table], **ON_MODELS)


def rows_of(facts: dict[str, Any]) -> list[list[str]]:
    """Return what was read from a poster as rows of a table."""
    rows = []
    for name, value in facts.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        words = name.replace("color", "colour").replace("_", " ")
        rows += [[f"{words} {part}".strip().replace("_", " "), str(one)] for part, one in parts]
    return [row for row in rows if row[0] != "file"]
