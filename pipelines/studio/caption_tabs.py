"""Tabs of an image–caption model: caption an image, draw a caption, invent images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from ..tools.cli import UserError
from ..tools.generated import Generated
from ..tools.grids import image_grid
from ..tools.repeating import DRAWING, PAIRS, Recipe
from .bounds import MOST_IMAGES, MOST_PROMPT_CHARACTERS, MOST_SEED, MOST_STEPS, plainly, text_of, whole
from .components import picture
from .examples import image_examples
from .generating import ON_MODELS, Files, Outputs
from .models import Model
from .repeats import RepeatingTab

MOST_BEAMS = 8
PAIR_STEPS = 50


def add_caption_tab(model: Model, examples: list[str]) -> None:
    """Add the controls that caption an image."""

    def caption(image: Image.Image | None, beams: Any) -> str:
        if image is None:
            raise UserError("no image is chosen; upload one first")
        with model.used() as pipeline:
            return pipeline.caption([image], num_beams=whole("the number of beams", beams, 1, MOST_BEAMS))[0]

    with gr.Row():
        with gr.Column():
            image = picture("Image to caption")
            image_examples(examples, image, "Example images")
            beams = gr.Slider(1, MOST_BEAMS, 1, step=1, label="Beams", info="1 takes the most likely word each time")
            button = gr.Button("Caption", variant="primary")
        result = gr.Textbox(label="Caption", interactive=False)
    button.click(plainly(caption), [image, beams], result, **ON_MODELS)


class DrawTab(RepeatingTab):
    """The controls that draw a caption."""

    task, conditions = DRAWING, {"prompt"}

    def __init__(self, model: Model, files: Files):
        self.model, self.files = model, files
        with gr.Row():
            with gr.Column():
                self.prompt = gr.Textbox(label="Caption to draw", max_length=MOST_PROMPT_CHARACTERS)
                if model.prompts:
                    gr.Examples([[prompt] for prompt in model.prompts], [self.prompt], label="Example captions")
                self.count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Number of images")
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED)
                self.add_repeating()
            outputs = Outputs("Drawings", "Draw")
        outputs.button.click(plainly(self._draw), self.inputs, outputs.components, **ON_MODELS)

    @property
    def inputs(self) -> list[Any]:
        return [self.prompt, self.count, self.seed]

    def repeated(self, recipe: Recipe) -> list[Any]:
        seed, count = recipe.batch(MOST_IMAGES)
        return [recipe.texts.get("prompt", ""), count, min(seed, MOST_SEED)]

    def facts(self, values: Sequence[Any]) -> dict[str, str]:
        return {"prompt": text_of("the caption", values[0])}

    def _draw(self, prompt: Any, count: Any, seed: Any) -> tuple[Any, Any, str]:
        import torch

        text = text_of("the caption", prompt)
        if not text:
            raise UserError("the caption is empty; write what is to be drawn")
        count, seed = whole("the number of images", count, 1, MOST_IMAGES), whole("the seed", seed, 0, MOST_SEED)
        seeds = [seed + number for number in range(count)]
        with self.model.used() as pipeline:
            generators = [torch.Generator().manual_seed(own) for own in seeds]
            images = pipeline.draw([text] * count, generator=generators).images
        generated = Generated([images], [seeds], [{"prompt": text}], {"model": self.model.name}, [seeds])
        paths, saved = self.files.save(generated)
        return list(zip(paths, (f"seed {own}" for own in seeds))), saved, f"{count} images."


class PairsTab(RepeatingTab):
    """The controls that invent images with their captions."""

    task, conditions = PAIRS, set[str]()

    def __init__(self, model: Model, files: Files):
        self.model, self.files = model, files
        with gr.Row():
            with gr.Column():
                count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Number of pairs")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED)
                steps = gr.Slider(1, MOST_STEPS, PAIR_STEPS, step=1, label="Steps")
                self.controls = [count, seed, steps]
                gr.Examples([[4, 0, PAIR_STEPS], [8, 100, 25]], self.controls, label="Example settings")
                self.add_repeating()
            outputs = Outputs("Inventions", "Invent")
        outputs.button.click(plainly(self._invent), self.inputs, outputs.components, **ON_MODELS)

    @property
    def inputs(self) -> list[Any]:
        return self.controls

    def repeated(self, recipe: Recipe) -> list[Any]:
        seed, count = recipe.batch(MOST_IMAGES)
        steps = recipe.number("num_inference_steps") or PAIR_STEPS
        return [count, min(seed, MOST_SEED), int(min(max(steps, 1), MOST_STEPS))]

    def facts(self, values: Sequence[Any]) -> dict[str, str]:
        steps = whole("the number of steps", values[2], 1, MOST_STEPS)
        return {"num_inference_steps": str(steps), "scheduler": type(self.model.pipeline._own_scheduler).__name__}

    def _invent(self, count: Any, seed: Any, steps: Any) -> tuple[Any, Any, str]:
        import torch

        facts = self.facts([count, seed, steps])
        count, seed = whole("the number of pairs", count, 1, MOST_IMAGES), whole("the seed", seed, 0, MOST_SEED)
        seeds = [seed + number for number in range(count)]
        with self.model.used() as pipeline:
            generators = [torch.Generator().manual_seed(own) for own in seeds]
            pairs = pipeline.sample(count, generator=generators, num_inference_steps=int(facts["num_inference_steps"]))
        generated = Generated(
            [[image] for image in pairs.images], [[own] for own in seeds],
            [{"caption": caption} for caption in pairs.captions], {"model": self.model.name, **facts}, [seeds],
        )  # fmt: skip
        paths, saved = self.files.save(generated, image_grid(pairs.images, pairs.captions))
        return list(zip(paths, pairs.captions)), saved, f"{count} pairs."
