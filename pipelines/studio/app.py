"""The page of the studio: a group of tabs for each model, and a tab of training runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ..tools.cli import UserError
from ..tools.repeating import Recipe
from .analysis_tab import add_analysis_tab
from .bounds import MOST_WAITING
from .brief_part import Brief
from .caption_tabs import DrawTab, add_caption_tab, add_pairs_tab
from .components import example_images
from .generating import Files, GeneratingTab
from .image_parts import Controls, FilledPart, StartingImage
from .models import Model
from .parts import Captions, Part
from .runs_tab import RunsTab

TITLE = "Halftone studio"
CSS = """
.status { min-height: 1.5em; }
.gradio-container { max-width: 1500px !important; }
.grid-wrap img, .image-frame img { image-rendering: auto; }
.grid-wrap, .below-label .image-container { padding-top: 32px !important; }
"""
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


class Studio:
    """The parts of a page while it is built.

    Args:
        models: what is shown, in this order.
        runs: the folder of training runs; None shows no tab for them.
        folder: for example images and what is generated.
        recipe: settings with which the first tab that has them opens.
    """

    def __init__(self, models: list[Model], runs: Path | None, folder: Path, recipe: Recipe | None = None):
        self.models, self.runs, self.recipe = models, runs, recipe
        self.files = Files(folder / "images")
        self.examples = example_images(folder / "examples")
        self.selected: str | None = None

    def build(self) -> gr.Blocks:
        """Return the page. Raises UserError if the recipe fits none of the models."""
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.Markdown(f"# {TITLE}")
            several = len(self.models) + (self.runs is not None) > 1
            with gr.Tabs() if several else contextlib.nullcontext():
                for number, model in enumerate(self.models):
                    with gr.Tab(model.name, id=f"model-{number}") if several else contextlib.nullcontext():
                        self._add_model(model)
                if self.runs is not None:
                    with gr.Tab("Training runs", id="runs") if several else contextlib.nullcontext():
                        for function, inputs, outputs in RunsTab(self.runs).load:
                            page.load(function, inputs, outputs, api_visibility="private", show_progress="hidden")
        if self.recipe is not None and self.selected is None:
            raise UserError(
                "--from_png was generated from conditions that none of the models takes; give the model that "
                f"generated it ({self.recipe.texts.get('model', 'its name is not in the file')}) as --model"
            )
        return page.queue(max_size=MOST_WAITING, default_concurrency_limit=4, api_open=False)

    def _add_model(self, model: Model) -> None:
        tabs = self._tabs(model)
        with gr.Tabs():
            for title, make in tabs.items():
                with gr.Tab(title):
                    tab = make()
                    self._open_with_recipe(tab, title)

    def _open_with_recipe(self, tab: Any, title: str) -> None:
        """Fill the first tab that has the conditions of the recipe."""
        if self.recipe is None or self.selected is not None or not hasattr(tab, "fill"):
            return
        texts = self.recipe.texts
        given = {name for name in ("prompt", "class_label", "brief") if name in texts}
        known = {name for part in getattr(tab, "parts", []) for name in getattr(part, "names", [])}
        known |= {"brief"} if any(isinstance(part, Brief) for part in getattr(tab, "parts", [])) else set()
        known |= {"prompt"} if isinstance(tab, DrawTab) else set()
        if given <= known:
            tab.fill(self.recipe)
            self.selected = title

    def _tabs(self, model: Model) -> dict[str, Callable[[], Any]]:
        """Return what makes each tab of a model, by its title."""
        if model.makes_pairs:
            tabs: dict[str, Callable[[], Any]] = {
                "Caption": functools.partial(add_caption_tab, model, self.examples),
                "Draw": functools.partial(DrawTab, model, self.files),
            }
            if model.pipeline.prior is not None:
                tabs["Invent"] = functools.partial(add_pairs_tab, model, self.files)
            return tabs
        if model.reads_posters:
            return {"Analyse": functools.partial(add_analysis_tab, model, self.examples)}
        conditions: Callable[[], Part] = Brief if model.takes_briefs else functools.partial(Captions, model)
        first = "Brief to poster" if model.takes_briefs else _first_title(model)
        parts: dict[str, list[Callable[[], Part]]] = {first: [conditions]}
        if model.takes_controls:
            parts["Control"] = [functools.partial(Controls, model, self.examples), conditions]
        if model.starts_from_images:
            parts["Image to image"] = [functools.partial(StartingImage, self.examples), conditions]
            parts["Inpainting"] = [functools.partial(FilledPart, model, self.examples), conditions]
        return {
            title: functools.partial(GeneratingTab, title, model, makers, self.files, sized=title == first)
            for title, makers in parts.items()
        }


def _first_title(model: Model) -> str:
    if model.takes_text:
        return "Text to image"
    return "Class to image" if model.labels else "Generate"
