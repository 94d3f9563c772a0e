"""The page of the studio: a group of tabs for each model, and a tab of training runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ..tools.cli import UserError
from ..tools.repeating import CONTROL, GENERATION, IMAGE_TO_IMAGE, INPAINTING, Recipe, same_model
from .analysis_tab import add_analysis_tab
from .bounds import MOST_WAITING
from .brief_part import Brief
from .caption_tabs import DrawTab, PairsTab, add_caption_tab
from .examples import Examples
from .generating import Files, GeneratingTab
from .image_parts import Controls, FilledPart, StartingImage
from .models import Model
from .parts import Captions, Part
from .repeats import RepeatingTab, show
from .runs_tab import RunsTab

TITLE = "Halftone studio"
CSS = """
.status { min-height: 1.5em; }
.gradio-container { max-width: 1500px !important; overflow: clip !important; }
.grid-wrap img, .image-frame img { image-rendering: auto; }
.outputs { position: sticky; top: 8px; align-self: flex-start; }
.results .grid-wrap { max-height: none; }
.results .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)); grid-auto-rows: auto; }
.results .grid-container:has(> :nth-child(5)) { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.results .grid-container:has(> :nth-child(10)) { grid-template-columns: repeat(4, minmax(0, 1fr)); }
.results .thumbnail-lg { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; }
.results .thumbnail-lg > img { aspect-ratio: 1; }
.results .caption-label { position: static; max-width: none; width: 100%; border: 0; white-space: normal; }
.grid-wrap, .below-label .image-container { padding-top: 32px !important; }
"""
"""The column of results stays beside long inputs, which it could not inside a container that hides what overflows."""
MUTED = {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"}
"""Gradio's own grey of explanations is too light to read."""
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
"""Fonts of the system: the page loads none from elsewhere."""

# Gradio gives some of its buttons and inputs no name, so a screen reader would say only "button". Each is named after
# its title, or the label of the component that it is part of.
# What belongs to an image, a canvas or a list of files becomes a group with the label of the component.
NAMES = """
() => {
  const named = (e) => e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.title
    || (e.labels && e.labels.length && e.labels[0].innerText.trim()) || e.innerText.trim();
  const name = () => {
    for (const e of document.querySelectorAll("button, input, textarea, select, [role=listbox]")) {
      if (e.dataset.named && e.innerText.trim()) { e.removeAttribute("aria-label"); delete e.dataset.named; }
      if (named(e)) continue;
      e.dataset.named = "true";
      const block = e.closest(".block");
      const label = block && block.querySelector("[data-testid=block-label], [data-testid=block-info], label, .label");
      const kind = e.tagName === "BUTTON" ? "button" : (e.type || "input");
      e.setAttribute("aria-label", ((label && label.innerText.trim()) || "Halftone studio") + ": " + kind);
    }
    for (const block of document.querySelectorAll(".block")) {
      const label = block.querySelector("[data-testid=block-label]");
      if (!label) continue;
      block.setAttribute("role", "group");
      const text = label.innerText.trim();
      for (const e of [block, ...block.querySelectorAll("canvas")]) e.setAttribute("aria-label", text);
    }
    for (const e of document.querySelectorAll("img:not([alt])")) e.alt = "";
    for (const e of document.querySelectorAll(".status")) e.setAttribute("aria-live", "polite");
    document.documentElement.lang = "en";
  };
  name();
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
}
"""


class Opened(NamedTuple):
    """A tab that can generate an image again, and where it is."""

    outer: str
    """Id of the tab of its model"""
    inner: gr.Tabs
    title: str
    tab: RepeatingTab


class Studio:
    """The parts of a page while it is built.

    Args:
        models: what is shown, in this order.
        runs: the folder of training runs; None shows no tab for them.
        folder: for example images and what is generated.
        recipe: settings of an image with which the page opens, in the tab that generated the image.
    """

    def __init__(self, models: list[Model], runs: Path | None, folder: Path, recipe: Recipe | None = None):
        self.models, self.runs, self.recipe = models, runs, recipe
        self.files = Files(folder / "images")
        self.examples = Examples(folder / "examples")
        self.outer: gr.Tabs | None = None
        self.opened: list[Opened] = []

    def build(self) -> gr.Blocks:
        """Return the page. Raises UserError if the recipe fits none of the models."""
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.Markdown(f"# {TITLE}")
            several = len(self.models) + (self.runs is not None) > 1
            with gr.Tabs() if several else contextlib.nullcontext() as self.outer:
                for number, model in enumerate(self.models):
                    name = f"model-{number}"
                    with gr.Tab(model.name, id=name) if several else contextlib.nullcontext():
                        self._add_model(model, name)
                if self.runs is not None:
                    with gr.Tab("Training runs", id="runs") if several else contextlib.nullcontext():
                        for function, inputs, outputs in RunsTab(self.runs).load:
                            page.load(function, inputs, outputs, api_visibility="private", show_progress="hidden")
            if self.recipe is not None:
                message = self._open_with(self.recipe)
                page.load(functools.partial(show, *message), None, None, api_visibility="private")
        return page.queue(max_size=MOST_WAITING, default_concurrency_limit=4, api_open=False)

    def _add_model(self, model: Model, name: str) -> None:
        tabs = self._tabs(model)
        with gr.Tabs() as inner:
            for title, make in tabs.items():
                with gr.Tab(title, id=title):
                    tab = make()
                    if isinstance(tab, RepeatingTab):
                        self.opened.append(Opened(name, inner, title, tab))

    def _open_with(self, recipe: Recipe) -> tuple[str, bool]:
        """Fill and select the tab that generates the image of a recipe again; return what the page says about it.

        It is a tab of the model with the name in the file, otherwise of the first model that can do it. Raises
        UserError if there is none.
        """
        suitable = [one for one in self.opened if one.tab.suits(recipe)]
        if not suitable:
            raise UserError(
                "--from_png was generated from conditions that none of the models takes, or in a way that none of them "
                f"can; give the model that generated it ({recipe.texts.get('model', 'its name is not in the file')}) "
                "as --model"
            )
        best = max(suitable, key=lambda one: same_model(recipe, one.tab.model.name))
        best.tab.fill(recipe)
        best.inner.selected = best.title
        if self.outer is not None:
            self.outer.selected = best.outer
        return best.tab.report(recipe)

    def _tabs(self, model: Model) -> dict[str, Callable[[], Any]]:
        """Return what makes each tab of a model, by its title."""
        if model.makes_pairs:
            tabs: dict[str, Callable[[], Any]] = {
                "Caption": functools.partial(add_caption_tab, model, self.examples.images),
                "Draw": functools.partial(DrawTab, model, self.files),
            }
            if model.pipeline.prior is not None:
                tabs["Invent"] = functools.partial(PairsTab, model, self.files)
            return tabs
        if model.reads_posters:
            return {"Analyse": functools.partial(add_analysis_tab, model, self.examples.posters)}
        conditions: Callable[[], Part] = Brief if model.takes_briefs else functools.partial(Captions, model)
        first = "Brief to poster" if model.takes_briefs else _first_title(model)
        parts: dict[str, tuple[str, list[Callable[[], Part]]]] = {first: (GENERATION, [conditions])}
        if model.takes_controls:
            parts["Control"] = (CONTROL, [functools.partial(Controls, model, self.examples), conditions])
        if model.starts_from_images:
            starting = functools.partial(StartingImage, self.examples.images)
            parts["Image to image"] = (IMAGE_TO_IMAGE, [starting, conditions])
            parts["Inpainting"] = (INPAINTING, [functools.partial(FilledPart, model, self.examples), conditions])
        return {
            title: functools.partial(GeneratingTab, title, task, model, makers, self.files)
            for title, (task, makers) in parts.items()
        }


def _first_title(model: Model) -> str:
    if model.takes_text:
        return "Text to image"
    return "Class to image" if model.labels else "Generate"
