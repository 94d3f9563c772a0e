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

from ..common.schedulers import make_scheduler
from ..tools.generated import Generated, save, save_image, slug
from ..tools.repeating import CONDITIONS, GENERATION, Recipe
from .bounds import plainly
from .models import Model
from .parts import Part, Sampling, divided, filled
from .repeats import RepeatingTab
from .running import generate

ON_MODELS: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
"""Options of events that use a model: they share one place in the queue, so that they run one after another."""
KEPT_SECONDS = 3600
"""How long the files of a generation are kept for downloading."""


class Outputs:
    """The button of a tab, and where it shows its images: a line of text, a gallery, and files to download."""

    def __init__(self, title: str, button: str, *, stops: bool = False) -> None:
        with gr.Column(elem_classes="outputs"):
            with gr.Row():
                self.button = gr.Button(button, variant="primary")
                self.stop = gr.Button("Stop") if stops else None
            self.status = gr.Markdown("", elem_classes="status", container=False)
            # The number of columns follows from the number of images, see CSS.
            self.gallery = gr.Gallery(
                label=f"{title}: images", columns=2, object_fit="contain", format="png",
                buttons=["download", "fullscreen"], interactive=False, elem_classes="results",
            )  # fmt: skip
            self.files = gr.File(
                label="Download: PNG files with all settings", file_count="multiple", interactive=False, height=200
            )
        self.components = [self.gallery, self.files, self.status]


class Files:
    """The folder of the images that a studio has generated. The files of an hour ago are deleted."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, generated: Generated, sheet: Image.Image | None = None) -> tuple[list[str], list[str]]:
        """Write each image as a PNG file with its conditions, seed and settings, and several also as one grid.

        Args:
            sheet: the grid; None is the one that `sample.py` makes.

        Returns:
            The paths of the images, and those of all files.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._delete_old()
        folder, images, titles = Path(tempfile.mkdtemp(dir=self.folder)), [], generated.titles()
        for row, title in enumerate(titles):
            for column, image in enumerate(generated.rows[row]):
                path = folder / _file_name(title, f"seed{generated.seeds[row][column]}")
                save_image(image, path, generated.metadata(row, column))
                images.append(str(path))
        if len(images) == 1:
            return images, images
        path = folder / _file_name(titles[0] if len(titles) == 1 else "", "grid")
        save(generated, str(path), sheet=sheet)
        return images, [*images, str(path)]

    def _delete_old(self) -> None:
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another request deletes it as well
                if folder.stat().st_mtime < time.time() - KEPT_SECONDS:
                    shutil.rmtree(folder)


def _file_name(title: str, name: str) -> str:
    return "_".join(filter(None, [slug(title), name])) + ".png"


class GeneratingTab(RepeatingTab):
    """A tab whose parts say what is generated; call it inside the layout that is open.

    Args:
        task: what the tab does, as `task_of` names it.
    """

    def __init__(self, title: str, task: str, model: Model, make_parts: Sequence[Callable[[], Part]], files: Files):
        self.title, self.task, self.model, self.files = title, task, model, files
        with gr.Row():
            with gr.Column():
                conditions = [make() for make in make_parts]
                self.sampling = Sampling(model, sized=task == GENERATION)
                self.parts: list[Part] = [*conditions, self.sampling]
                self.conditions = {name for part in self.parts for name in part.names}
                self.add_repeating()
            outputs = Outputs(title, "Generate", stops=True)
        running = outputs.button.click(
            plainly(self._generate), self.inputs, outputs.components,
            **ON_MODELS, show_progress="minimal",
        )  # fmt: skip
        assert outputs.stop is not None
        outputs.stop.click(
            lambda: "Stopped.", None, outputs.status, cancels=[running], queue=False, api_visibility="private"
        )

    @property
    def inputs(self) -> list[Any]:
        return [component for part in self.parts for component in part.components]

    def repeated(self, recipe: Recipe) -> list[Any]:
        return filled(self.parts, recipe)

    def facts(self, values: Sequence[Any]) -> dict[str, str]:
        by_part = divided(self.parts, values)
        facts: dict[str, str] = {}
        for part, own in zip(self.parts, by_part, strict=True):
            facts |= part.facts(own)
        sampler = self.sampling.sampler_of(by_part[-1])
        facts |= {"sampler": sampler} if sampler else {}
        return facts | {"scheduler": self._scheduler_class(sampler)}

    def _generate(self, *values: Any) -> Iterator[tuple[Any, Any, str]]:
        by_part = divided(self.parts, values)
        sampled = by_part[-1]
        count, seed = self.sampling.count_of(sampled), self.sampling.seed_of(sampled)
        arguments: dict[str, Any] = {}
        for part, own in zip(self.parts, by_part, strict=True):
            made = part.made(own, count)
            # The first parts win: the number of images follows from the controls, whether there are prompts or not.
            arguments = made.arguments | arguments
        sampler, facts = self.sampling.sampler_of(sampled), self.facts(values)
        started = time.monotonic()
        yield gr.skip(), None, "Started."
        with contextlib.closing(generate(self.model, arguments, sampler)) as shown:
            for event in shown:
                if event.done:
                    paths, files = self.files.save(self._described(event.images, seed, facts))
                    seconds = time.monotonic() - started
                    titled = [(path, f"seed {seed + number}") for number, path in enumerate(paths)]
                    yield titled, files, f"{len(paths)} images in {seconds:.1f} s."
                else:
                    yield event.images, gr.skip(), f"Step {event.step} of {event.steps}."

    def _described(self, images: list[Image.Image], seed: int, facts: dict[str, str]) -> Generated:
        conditions: dict[str, str] = {name: facts[name] for name in CONDITIONS if name in facts}
        settings = {"model": self.model.name, **{name: text for name, text in facts.items() if name not in conditions}}
        seeds = [seed + number for number in range(len(images))]
        return Generated([images], [seeds], [conditions], settings, [seeds])

    def _scheduler_class(self, sampler: str | None) -> str:
        # The model is not asked, because it may be in use.
        own = self.model.pipeline._own_scheduler
        return type(make_scheduler(sampler, own) if sampler else own).__name__
