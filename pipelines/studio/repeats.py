"""Setting the controls of a tab to those with which an image was generated, from its PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ..tools.cli import UserError, one_line, printable
from ..tools.repeating import CONTROL, IMAGE_TO_IMAGE, INPAINTING, PAIRS, Recipe, read_recipe, same_model, task_of
from .bounds import MESSAGE_SECONDS, plainly
from .models import Model
from .parts import KEPT

MOST_CHARACTERS = 60
"""Of a setting in a message"""
CHOSEN_AGAIN = {
    IMAGE_TO_IMAGE: "The image is not part of the file: choose it again.",
    INPAINTING: "The image and its mask are not part of the file: choose and paint them again.",
    CONTROL: "The control images are not part of the file: draw or upload them again.",
}


class RepeatingTab:
    """A tab whose images can be generated again. Subclasses set the attributes and define `repeated` and `facts`."""

    model: Model
    task: str
    """What the tab does, as `task_of` names it"""
    conditions: set[str]
    """Names of the conditions that the tab takes, out of CONDITIONS"""

    @property
    def inputs(self) -> list[Any]:
        """The components whose values generate images."""
        raise NotImplementedError

    def repeated(self, recipe: Recipe) -> list[Any]:
        """Return the values of `inputs` with which an image is generated again; KEPT leaves one as it is."""
        raise NotImplementedError

    def facts(self, values: Sequence[Any]) -> dict[str, str]:
        """Return the settings that the files of images with these values would have. Raises UserError."""
        raise NotImplementedError

    def suits(self, recipe: Recipe) -> bool:
        """Whether the tab does what generated the image, and takes its conditions."""
        return task_of(recipe) == self.task and recipe.conditions() <= self.conditions

    def fill(self, recipe: Recipe) -> None:
        """Let the page open with the settings of an image. Raises UserError if they cannot be read or used."""
        values = self.repeated(recipe)
        self.facts(values)
        for component, value in zip(self.inputs, values, strict=True):
            if value is not KEPT:
                component.value = value

    def add_repeating(self) -> None:
        """Add the controls that take a PNG file."""
        with gr.Accordion("Repeat an image", open=False):
            file = gr.File(label="PNG file of the studio or of sample.py", file_types=[".png"], height=120)
            gr.Button("Use its settings", size="sm").click(
                plainly(self._use), file, self.inputs, api_visibility="private"
            )

    def _use(self, path: str | None) -> list[Any]:
        if not path:
            raise UserError("no PNG file is chosen; upload one first")
        recipe = read_recipe(path)
        values = self.repeated(recipe)
        show(*self.report(recipe))
        return [gr.skip() if value is KEPT else value for value in values]

    def report(self, recipe: Recipe) -> tuple[str, bool]:
        """Return a message on the settings that were set, and whether the images will be other ones. Raises UserError.

        They are if a setting of the file is not set, or the file is from another model or another kind of tab.
        """
        sentences = ["The settings of the file are set."]
        if recipe.num_images > 1:
            sentences.append(f"{recipe.num_images} images are generated together, as before.")
            if recipe.texts.get("seed", "").isdecimal():
                sentences.append(f"The image of the file has the seed {recipe.seed + recipe.place}.")
        if self.task in CHOSEN_AGAIN:
            sentences.append(CHOSEN_AGAIN[self.task])
        doubts = self._doubts(recipe)
        return " ".join([*sentences, *doubts]), bool(doubts)

    def _doubts(self, recipe: Recipe) -> list[str]:
        doubts, task = [], task_of(recipe)
        if task != self.task:
            done = "of a pair of image and caption" if task == PAIRS else f"by {task}"
            doubts.append(f"But the image was generated {done}, which this tab does not do.")
        if left_out := recipe.differing(self.facts(self.repeated(recipe))):
            values = {"height": str(recipe.size and recipe.size[0]), "width": str(recipe.size and recipe.size[1])}
            named = [f"{name.replace('_', ' ')} ({_short((recipe.texts | values)[name])})" for name in left_out]
            doubts.append(f"But this tab cannot set these settings of the file: {', '.join(named)}.")
        if not same_model(recipe, self.model.name):
            used = recipe.texts.get("model")
            used = f"by the model {_short(used)}" if used else "by a model that it does not name"
            doubts.append(f"But the file was generated {used}, and this one is {self.model.name}.")
        return [*doubts, "So other images will be generated."] if doubts else []


def show(text: str, is_warning: bool) -> None:
    """Show a message in the page."""
    if is_warning:
        gr.Warning(text, duration=MESSAGE_SECONDS, title="The images will differ")
    else:
        gr.Info(text, duration=MESSAGE_SECONDS)


def _short(text: str) -> str:
    shown = one_line(printable(text))
    return shown if len(shown) <= MOST_CHARACTERS else f"{shown[:MOST_CHARACTERS]}…"
