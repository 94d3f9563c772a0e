"""Tabs of an image–caption model: caption an image, draw a caption, invent images with captions."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from ..tools.cli import UserError
from ..tools.generated import Generated
from ..tools.repeating import Recipe
from .bounds import MOST_IMAGES, MOST_PROMPT_CHARACTERS, MOST_SEED, MOST_STEPS, plainly, text_of, whole
from .components import image_examples, picture
from .generating import ON_MODELS, Files, Outputs
from .models import Model

MOST_BEAMS = 8


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


class DrawTab:
    """The controls that draw a caption."""

    def __init__(self, model: Model, files: Files):
        self.model, self.files = model, files
        with gr.Row():
            with gr.Column():
                self.prompt = gr.Textbox(label="Caption to draw", max_length=MOST_PROMPT_CHARACTERS)
                if model.prompts:
                    gr.Examples([[prompt] for prompt in model.prompts], [self.prompt], label="Example captions")
                self.count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Number of images")
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED)
                button = gr.Button("Draw", variant="primary")
            with gr.Column():
                outputs = Outputs("Drawings")
        inputs = [self.prompt, self.count, self.seed]
        button.click(
            plainly(self._draw),
            inputs,
            outputs.components,
            **ON_MODELS,
        )

    def fill(self, recipe: Recipe) -> None:
        """Let the page open with the settings of an image."""
        self.prompt.value = recipe.texts.get("prompt", "")
        seed, self.count.value = recipe.batch(MOST_IMAGES)
        self.seed.value = min(seed, MOST_SEED)

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
        paths = self.files.save(generated)
        return list(zip(paths, (f"seed {own}" for own in seeds))), paths, f"{count} images."


def add_pairs_tab(model: Model, files: Files) -> None:
    """Add the controls that invent images with their captions."""

    def invent(count: Any, seed: Any, steps: Any) -> tuple[Any, Any, str]:
        import torch

        count, seed = whole("the number of pairs", count, 1, MOST_IMAGES), whole("the seed", seed, 0, MOST_SEED)
        steps, seeds = whole("the number of steps", steps, 1, MOST_STEPS), [seed + number for number in range(count)]
        with model.used() as pipeline:
            generators = [torch.Generator().manual_seed(own) for own in seeds]
            pairs = pipeline.sample(count, generator=generators, num_inference_steps=steps)
        paths = []
        for image, caption, own in zip(pairs.images, pairs.captions, seeds, strict=True):
            settings = {"model": model.name, "num_inference_steps": str(steps)}
            paths += files.save(Generated([[image]], [[own]], [{"caption": caption}], settings))
        return list(zip(paths, pairs.captions)), paths, "\n".join(f"- {caption}" for caption in pairs.captions)

    with gr.Row():
        with gr.Column():
            count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Number of pairs")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED)
            steps = gr.Slider(1, MOST_STEPS, 50, step=1, label="Steps")
            gr.Examples([[4, 0, 50], [8, 100, 25]], [count, seed, steps], label="Example settings")
            button = gr.Button("Invent", variant="primary")
        with gr.Column():
            outputs = Outputs("Inventions")
    button.click(
        plainly(invent), [count, seed, steps], outputs.components, **ON_MODELS,
    )  # fmt: skip
