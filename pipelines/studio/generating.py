"""Tabs that generate images step by step: the parts of a tab, its button, and what it shows."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..tools.cli import UserError
from ..tools.generated import Generated, save_image, slug
from ..tools.repeating import Recipe, read_recipe
from .bounds import plainly
from .models import Model
from .parts import KEPT, Part, Sampling, divided, filled
from .running import generate

ON_MODELS: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
"""Options of events that use a model: they share one place in the queue, so that they run one after another."""
KEPT_SECONDS = 3600
"""How long the files of a generation are kept for downloading."""


class Outputs:
    """Where a tab shows its images: a gallery, files to download, and a line of text."""

    def __init__(self, title: str) -> None:
        self.status = gr.Markdown("", elem_classes="status", container=False)
        self.gallery = gr.Gallery(
            label=f"{title}: images", columns=4, object_fit="contain", height=420, format="png",
            buttons=["download", "fullscreen"], interactive=False,
        )  # fmt: skip
        self.files = gr.File(
            label="Download: PNG files with all settings", file_count="multiple", interactive=False, height=120
        )
        self.components = [self.gallery, self.files, self.status]


class Files:
    """The folder of the images that a studio has generated. The files of an hour ago are deleted."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, generated: Generated) -> list[str]:
        """Write each image as a PNG file with its conditions, seed and settings; return the paths."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._delete_old()
        folder, paths = Path(tempfile.mkdtemp(dir=self.folder)), []
        for column, image in enumerate(generated.rows[0]):
            title, seed = slug(generated.titles()[0]), f"seed{generated.seeds[0][column]}"
            path = folder / ("_".join(filter(None, [title, seed])) + ".png")
            save_image(image, path, generated.metadata(0, column))
            paths.append(str(path))
        return paths

    def _delete_old(self) -> None:
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another request deletes it as well
                if folder.stat().st_mtime < time.time() - KEPT_SECONDS:
                    shutil.rmtree(folder)


class GeneratingTab:
    """A tab whose parts say what is generated; call it inside the layout that is open."""

    def __init__(
        self, title: str, model: Model, make_parts: Sequence[Callable[[], Part]], files: Files, *, sized: bool = True
    ):
        self.title, self.model, self.files = title, model, files
        with gr.Row():
            with gr.Column():
                conditions = [make() for make in make_parts]
                self.sampling = Sampling(model, sized=sized)
                self.parts: list[Part] = [*conditions, self.sampling]
                with gr.Row():
                    button = gr.Button("Generate", variant="primary")
                    stop = gr.Button("Stop")
                self._add_repeating()
            with gr.Column():
                self.outputs = Outputs(title)
        running = button.click(
            plainly(self._generate), self.inputs, self.outputs.components,
            **ON_MODELS, show_progress="minimal",
        )  # fmt: skip
        stop.click(
            lambda: "Stopped.", None, self.outputs.status, cancels=[running], queue=False, api_visibility="private"
        )

    @property
    def inputs(self) -> list[Any]:
        return [component for part in self.parts for component in part.components]

    def fill(self, recipe: Recipe) -> None:
        """Let the page open with the settings of an image. Raises UserError if they cannot be read."""
        for component, value in zip(self.inputs, filled(self.parts, recipe), strict=True):
            if value is not KEPT:
                component.value = value

    def _add_repeating(self) -> None:
        with gr.Accordion("Repeat an image", open=False):
            file = gr.File(label="PNG file of the studio or of sample.py", file_types=[".png"], height=120)
            gr.Button("Use its settings", size="sm").click(
                plainly(self._repeated), file, self.inputs, api_visibility="private"
            )

    def _repeated(self, path: str | None) -> list[Any]:
        if not path:
            raise UserError("no PNG file is chosen; upload one first")
        recipe = read_recipe(path)
        values = filled(self.parts, recipe)
        text = "The settings of the file are set. Uploaded images and drawings are not part of it."
        if recipe.num_images > 1 and recipe.texts["seed"].isdecimal():
            others = f"{recipe.num_images} images are generated together, as before."
            text += f" {others} The image of the file has the seed {recipe.seed + recipe.place}."
        gr.Info(text)
        return [gr.skip() if value is KEPT else value for value in values]

    def _generate(self, *values: Any) -> Iterator[tuple[Any, Any, str]]:
        by_part = divided(self.parts, values)
        sampled = by_part[-1]
        count, seed = self.sampling.count_of(sampled), self.sampling.seed_of(sampled)
        arguments: dict[str, Any] = {}
        facts: dict[str, str] = {}
        for part, own in zip(self.parts, by_part, strict=True):
            made = part.made(own, count)
            # The first parts win: the number of images follows from the controls, whether there are prompts or not.
            arguments = made.arguments | arguments
            facts |= made.facts
        sampler = self.sampling.sampler_of(sampled)
        started = time.monotonic()
        yield gr.skip(), None, "Started."
        with contextlib.closing(generate(self.model, arguments, sampler)) as shown:
            for event in shown:
                if event.done:
                    paths = self.files.save(self._described(event.images, seed, facts, sampler))
                    seconds = time.monotonic() - started
                    titled = [(path, f"seed {seed + number}") for number, path in enumerate(paths)]
                    yield titled, paths, f"{len(paths)} images in {seconds:.1f} s."
                else:
                    yield event.images, gr.skip(), f"Step {event.step} of {event.steps}."

    def _described(self, images: list[Image.Image], seed: int, facts: dict[str, str], sampler: str | None) -> Generated:
        names = ("prompt", "class_label", "brief")
        conditions: dict[str, str] = {name: facts[name] for name in names if name in facts}
        settings = {"model": self.model.name, **{name: text for name, text in facts.items() if name not in conditions}}
        settings["scheduler"] = self._scheduler_class(sampler)
        if sampler:
            settings["sampler"] = sampler
        seeds = [seed + number for number in range(len(images))]
        return Generated([images], [seeds], [conditions], settings, [seeds])

    def _scheduler_class(self, sampler: str | None) -> str:
        with self.model.used(sampler) as pipeline:
            return type(pipeline.scheduler).__name__
