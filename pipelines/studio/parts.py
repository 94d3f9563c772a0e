"""The parts that the tabs for generating consist of: what the images show, and how they are sampled.

A part makes its controls, and turns their values into arguments of a pipeline and metadata of the image files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ..common.distilled import sampling_defaults
from ..common.schedulers import suitable_samplers
from ..tools.cli import UserError
from ..tools.repeating import Recipe, sampler_of
from .bounds import (
    LABELS,
    MOST_GUIDANCE,
    MOST_IMAGES,
    MOST_PROMPT_CHARACTERS,
    MOST_SEED,
    MOST_SIDE_FACTOR,
    MOST_STEPS,
    in_range,
    text_of,
    whole,
)
from .models import Model

OWN = "of the model"
NO_LABEL = "any"
KEPT = object()


@dataclass
class Made:
    """What a part contributes to a call: arguments of the pipeline, and texts for the metadata."""

    arguments: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


class Part:
    """A part of a tab; its `components` are created with it, inside the layout that is open."""

    components: list[Any]
    names: Sequence[str] = ()
    """Names of the conditions that the components stand for, as in the metadata"""

    def made(self, values: Sequence[Any], count: int) -> Made:
        """Return what the values of the components mean for `count` images. Raises UserError."""
        raise NotImplementedError

    def facts(self, values: Sequence[Any]) -> dict[str, str]:
        """Return the metadata for the values, without images that may not be chosen yet. Raises UserError."""
        return self.made(values, 1).facts

    def repeated(self, recipe: Recipe) -> list[Any]:
        """Return the values of the components with which an image is generated again; KEPT leaves one as it is."""
        return [KEPT for _ in self.components]


class Captions(Part):
    """Prompt, negative prompt and class label, as far as the model takes them."""

    def __init__(self, model: Model):
        self.model, self.labels = model, model.labels
        self.names: list[str] = []
        self.components = []
        if model.takes_text:
            most = MOST_PROMPT_CHARACTERS
            prompt = gr.Textbox(
                label=LABELS["prompt"], info="What the images show; may stay empty", lines=2, max_length=most
            )
            without = "What the images do not show; needs a guidance scale above 1"
            self._add("prompt", prompt)
            if not model.distilled:  # without guidance, it would have no effect
                self._add("negative_prompt", gr.Textbox(label=LABELS["negative_prompt"], info=without, max_length=most))
        if self.labels:
            choices = [NO_LABEL, *self.labels]
            self._add(
                "class_label",
                gr.Dropdown(choices, value=NO_LABEL, label=LABELS["class_labels"], info="Class of the images"),
            )
        self._add_examples()

    def _add(self, name: str, component: Any) -> None:
        self.names.append(name)
        self.components.append(component)

    def _add_examples(self) -> None:
        if self.model.takes_text and self.model.prompts:
            gr.Examples([[prompt] for prompt in self.model.prompts], self.components[:1], label="Example prompts")
        elif self.labels:
            gr.Examples([[label] for label in self.labels[:8]], self.components[-1:], label="Example classes")

    def made(self, values: Sequence[Any], count: int) -> Made:
        given = dict(zip(self.names, values, strict=True))
        prompt = text_of("the prompt", given.get("prompt"))
        negative = text_of("the negative prompt", given.get("negative_prompt"))
        label = given.get("class_label") or NO_LABEL
        if label != NO_LABEL and label not in self.labels:
            raise UserError(f"'{label}' is not a class of this model; choose one of {', '.join(self.labels[:20])}")
        arguments: dict[str, Any] = {"prompt": [prompt] * count if prompt else None}
        if label != NO_LABEL:
            arguments["class_labels"] = [self.labels.index(label)] * count
        arguments["negative_prompt"] = negative or None
        # Without a condition there is one row, whose images are all generated in the same way.
        arguments["num_images_per_prompt"] = 1 if prompt or label != NO_LABEL else count
        facts = {"prompt": prompt, "negative_prompt": negative, "class_label": "" if label == NO_LABEL else label}
        return Made(arguments, {name: text for name, text in facts.items() if text})

    def repeated(self, recipe: Recipe) -> list[Any]:
        empty = {"class_label": NO_LABEL}
        texts = {name: text for name, text in recipe.texts.items() if name != "class_label" or text in self.labels}
        return [texts.get(name, empty.get(name, "")) for name in self.names]


class Sampling(Part):
    """Steps, guidance, sampler, seed, number and size of the images."""

    def __init__(self, model: Model, *, sized: bool = True):
        self.model, self.sized = model, sized
        self.own_class = type(model.pipeline.scheduler).__name__
        zero_snr = bool(model.pipeline._own_scheduler.config.get("rescale_betas_zero_snr"))
        self.samplers = [OWN, *suitable_samplers(model.pipeline.config.prediction_type, zero_snr)]
        self.defaults = sampling_defaults(model.pipeline)
        height, width = model.size()
        with gr.Row():
            self.count = gr.Slider(1, MOST_IMAGES, 4, step=1, label=LABELS["num_images_per_prompt"])
            self.seed = gr.Number(
                0, label=LABELS["generator"], info="The same seed gives the same images",
                precision=0, minimum=0, maximum=MOST_SEED,
            )  # fmt: skip
        another = gr.Button("Another seed", size="sm")
        another.click(lambda: random.randrange(MOST_SEED), None, self.seed, queue=False)
        with gr.Accordion("Sampling", open=False):
            trained_for = f"The model was distilled for {self.defaults.num_inference_steps}"
            steps_ = gr.Slider(
                1, MOST_STEPS, self.defaults.num_inference_steps, step=1, label=LABELS["num_inference_steps"],
                info=trained_for if model.distilled else "More steps take longer",
            )  # fmt: skip
            # The weights of a distilled model contain guidance, so that there is nothing to choose.
            guidance = gr.Slider(
                1, MOST_GUIDANCE, self.defaults.guidance_scale, step=0.1, label=LABELS["guidance_scale"],
                info="1 disables guidance", visible=not model.distilled,
            )  # fmt: skip
            scheduler = gr.Dropdown(self.samplers, value=OWN, label="Scheduler")
            side = {"step": 1, "precision": 0, "minimum": 1, "visible": sized}
            height_ = gr.Number(height, label=LABELS["height"], **side)
            width_ = gr.Number(width, label=LABELS["width"], **side)
        self.components = [self.count, self.seed, steps_, guidance, scheduler, height_, width_]

    def repeated(self, recipe: Recipe) -> list[Any]:
        steps, scale = recipe.number("num_inference_steps"), recipe.number("guidance_scale")
        if scale is None or self.model.distilled:
            scale = self.defaults.guidance_scale
        sampler = sampler_of(recipe, self.own_class)
        height, width = recipe.size or self.model.size()
        seed, count = recipe.batch(MOST_IMAGES)
        return [
            count,
            min(seed, MOST_SEED),
            int(min(max(steps or self.defaults.num_inference_steps, 1), MOST_STEPS)),
            min(max(scale, 1), MOST_GUIDANCE),
            sampler if sampler in self.samplers else OWN,
            height,
            width,
        ]

    def made(self, values: Sequence[Any], count: int) -> Made:
        import torch

        _, seed, steps, scale, _, height, width = values
        seed = whole("the seed", seed, 0, MOST_SEED)
        steps = whole("the number of steps", steps, 1, MOST_STEPS)
        scale = self.defaults.guidance_scale if self.model.distilled else scale
        scale = in_range("the guidance scale", scale, 1, MOST_GUIDANCE)
        trained = self.model.size()
        if self.sized:
            height = whole("the height", height, 1, MOST_SIDE_FACTOR * trained[0])
            width = whole("the width", width, 1, MOST_SIDE_FACTOR * trained[1])
        else:
            height, width = trained
        return Made(
            {
                "num_inference_steps": steps,
                "guidance_scale": scale,
                "height": height,
                "width": width,
                "generator": [torch.Generator().manual_seed(seed + number) for number in range(count)],
            },
            {
                "num_inference_steps": str(steps),
                "guidance_scale": f"{scale:g}",
                "height": str(height),
                "width": str(width),
            },
        )

    def count_of(self, values: Sequence[Any]) -> int:
        """Return the number of images. Raises UserError."""
        return whole("the number of images", values[0], 1, MOST_IMAGES)

    def seed_of(self, values: Sequence[Any]) -> int:
        return whole("the seed", values[1], 0, MOST_SEED)

    def sampler_of(self, values: Sequence[Any]) -> str | None:
        """Return the name of the chosen sampler; None for that of the model. Raises UserError."""
        name = values[4] or OWN
        if name not in self.samplers:
            raise UserError(f"the scheduler '{name}' does not suit this model; use one of {', '.join(self.samplers)}")
        return None if name == OWN else name


def filled(parts: Sequence[Part], recipe: Recipe) -> list[Any]:
    """Return the values of the components of all parts for a recipe; see `Part.repeated`."""
    return [value for part in parts for value in part.repeated(recipe)]


def divided(parts: Sequence[Part], values: Sequence[Any]) -> list[list[Any]]:
    """Divide the values of all components among the parts."""
    result, start = [], 0
    for part in parts:
        result.append(list(values[start : start + len(part.components)]))
        start += len(part.components)
    return result
