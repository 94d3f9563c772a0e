"""The parts of a tab that take images: an image to change, a part of it to fill, and controls to draw or upload."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ..common.class_colors import class_color
from ..common.poster_domain import COLOR_ROLES, hex_color
from ..models.fusion_controlnet import as_nets
from ..tools.cli import UserError
from ..tools.control_files import ControlFile, controls_of
from ..tools.repeating import CONTROL, INPAINTING, Recipe, task_of
from .bounds import in_range, plainly, whole
from .components import blank, canvas, on_canvas, painted, picture, strokes
from .examples import BLACK, WHITE, Examples, image_examples
from .models import Model
from .parts import KEPT, Made, Part

MOST_JUMPS = 10
MOST_STRENGTH = 2


class StartingImage(Part):
    """An image that is changed, and how much of it."""

    def __init__(self, examples: Sequence[str]):
        self.image = picture("Image to change")
        image_examples(examples, self.image, "Example images")
        self.strength = gr.Slider(
            0, 1, 0.6, step=0.01, label="Strength", info="0 keeps the image, 1 generates another one"
        )
        self.components = [self.image, self.strength]

    def made(self, values: Sequence[Any], count: int) -> Made:
        image, strength = values
        if image is None:
            raise UserError("no image is chosen; upload the image to change first")
        strength = in_range("the strength", strength, 0, 1)
        return Made({"image": image, "strength": strength}, self.facts(values))

    def facts(self, values: Sequence[Any]) -> dict[str, str]:
        strength = values[1]
        return {} if strength is KEPT else {"strength": f"{in_range('the strength', strength, 0, 1):g}"}

    def repeated(self, recipe: Recipe) -> list[Any]:
        strength = recipe.number("strength")
        return [KEPT, KEPT if strength is None else strength]


class FilledPart(Part):
    """An image and the part of it that is filled, painted on a canvas or given as a mask."""

    def __init__(self, model: Model, examples: Examples):
        self.model = model
        self.image = picture("Image to fill")
        image_examples(examples.images, self.image, "Example images")
        self.canvas = canvas("Paint the part to fill", [WHITE])
        with gr.Accordion("Upload a mask instead of painting", open=False):
            self.mask = picture("Mask instead of painting (white is filled)")
            image_examples(examples.masks, self.mask, "Example masks")
        self.paste_back = gr.Checkbox(True, label="Keep all other pixels exactly")
        self.jumps = gr.Slider(
            1, MOST_JUMPS, 1, step=1, label="Repetitions of each step", info="More fit better, and take longer"
        )
        self.image.change(plainly(self._shown), self.image, self.canvas)
        self.components = [self.image, self.canvas, self.mask, self.paste_back, self.jumps]

    def _shown(self, image: Image.Image | None) -> Any:
        return None if image is None else as_value(on_canvas(image, self.model.size()))

    def made(self, values: Sequence[Any], count: int) -> Made:
        image, drawing, mask, paste_back, jumps = values
        if image is None:
            raise UserError("no image is chosen; upload the image to fill first")
        image = on_canvas(image, self.model.size())
        if mask is not None:
            mask_image = on_canvas(mask, self.model.size()).convert("L")
        else:
            layer = strokes(drawing)
            if layer is None:
                raise UserError("nothing is painted on the canvas; paint the part to fill with the brush")
            mask_image = layer.getchannel("A").resize(image.size).point(lambda value: 255 if value > 127 else 0)
        jumps = whole("the number of repetitions", jumps, 1, MOST_JUMPS)
        arguments = {
            "image": image,
            "mask_image": mask_image,
            "jump_n_sample": jumps,
            "paste_back": bool(paste_back),
        }
        return Made(arguments, self.facts(values))

    def facts(self, values: Sequence[Any]) -> dict[str, str]:
        paste_back, jumps = values[-2:]
        if jumps is KEPT:
            return {}
        jumps = whole("the number of repetitions", jumps, 1, MOST_JUMPS)
        # Nothing of the part is kept, as sample.py does it without --strength.
        return {"jump_n_sample": str(jumps), "paste_back": str(bool(paste_back)).lower(), "strength": "1"}

    def repeated(self, recipe: Recipe) -> list[Any]:
        if task_of(recipe) != INPAINTING:
            return [KEPT] * len(self.components)
        jumps = recipe.number("jump_n_sample")  # sample.py writes only what was given
        return [KEPT, KEPT, KEPT, recipe.texts.get("paste_back") == "true", 1 if jumps is None else jumps]


class Controls(Part):
    """A canvas for each image that the ControlNets of a model take, and how strongly they steer."""

    def __init__(self, model: Model, examples: Examples):
        self.model = model
        self.nets = as_nets(model.pipeline.controlnet)
        self.components, self.canvases = [], 0
        for number, net in enumerate(self.nets, start=1):
            several = f" (ControlNet {number})" if len(self.nets) > 1 else ""
            for name in _names(net.config):
                self._add_canvas(f"{name}{several}", net.config, examples)
        with gr.Accordion("Strength of the control", open=False):
            for number in range(1, len(self.nets) + 1):
                label = "Strength" if len(self.nets) == 1 else f"Strength of ControlNet {number}"
                self.components.append(gr.Slider(0, MOST_STRENGTH, 1, step=0.05, label=label, info="0 switches it off"))
            self.components += [
                gr.Slider(0, 1, 0, step=0.01, label="Starts at this share of the steps"),
                gr.Slider(0, 1, 1, step=0.01, label="Ends at this share of the steps"),
            ]

    def _add_canvas(self, label: str, config: Any, examples: Examples) -> None:
        size, colors = self.model.size(), _colors(config)
        drawing = canvas(f"Draw: {label}", _brushes(config, colors), as_value(blank(size, colors[0])))
        if config.control_kind == "classes":
            gr.Markdown(_legend(config, colors))
        with gr.Accordion(f"Upload instead of drawing: {label}", open=False):
            uploaded = picture(f"Upload: {label}")
            files = examples.of_control(config.control_kind, label, colors)
            image_examples(files, uploaded, f"Example images: {label}")
            gr.Button(f"Empty the canvas: {label}", size="sm").click(
                functools.partial(as_value, blank(size, colors[0])), None, drawing, queue=False
            )
        uploaded.change(plainly(functools.partial(self._shown, config.control_kind)), uploaded, drawing)
        self.components.append(drawing)
        self.canvases += 1

    def _shown(self, kind: str, image: Image.Image | None) -> Any:
        if image is None:
            return gr.skip()
        shown = on_canvas(image, self.model.size())
        return as_value(shown.convert("L").convert("RGB") if kind == "masks" else shown)

    def made(self, values: Sequence[Any], count: int) -> Made:
        import torch

        height, width = self.model.size()
        canvases = values[: self.canvases]
        files, start = [], 0
        for net in self.nets:
            names = _names(net.config)
            own = [self._control(net.config, name, value) for name, value in zip(names, canvases[start:])]
            files += own
            start += len(names)
        if all(_is_plain(file.image) for file in files):
            raise UserError("every canvas is empty; draw on one, or upload an image for it")
        control = controls_of(self.model.pipeline, files, height, width)[0]
        batches = [torch.stack([tensor] * count) for tensor in control]
        strengths, begins, ends = self._steering(values)
        arguments = {
            "control_image": batches if len(batches) > 1 else batches[0],
            "controlnet_conditioning_scale": strengths if len(strengths) > 1 else strengths[0],
            "control_guidance_start": begins,
            "control_guidance_end": ends,
            "num_images_per_prompt": 1,
        }
        return Made(arguments, self.facts(values))

    def _steering(self, values: Sequence[Any]) -> tuple[list[float], float, float]:
        """Return the strength of each ControlNet, and the shares of the steps where they begin and end."""
        strengths = [
            in_range("the strength of the control", one, 0, MOST_STRENGTH) for one in values[self.canvases : -2]
        ]
        begins, ends = (in_range("the share of the steps", value, 0, 1) for value in values[-2:])
        return strengths, begins, ends

    def facts(self, values: Sequence[Any]) -> dict[str, str]:
        if KEPT in values[self.canvases :]:
            return {}
        strengths, begins, ends = self._steering(values)
        return {
            "controlnet_conditioning_scale": ", ".join(f"{scale:g}" for scale in strengths),
            "control_guidance_start": f"{begins:g}",
            "control_guidance_end": f"{ends:g}",
        }

    def repeated(self, recipe: Recipe) -> list[Any]:
        if task_of(recipe) != CONTROL:
            return [KEPT] * len(self.components)
        # sample.py writes only what was given; one strength stands for all ControlNets.
        strengths = recipe.numbers("controlnet_conditioning_scale") or [1.0]
        strengths = strengths * len(self.nets) if len(strengths) == 1 else strengths
        if len(strengths) != len(self.nets):  # the file is from another model
            strengths = [1.0] * len(self.nets)
        begins, ends = (
            recipe.numbers("control_guidance_start") or [0.0],
            recipe.numbers("control_guidance_end") or [1.0],
        )
        return [*[KEPT] * self.canvases, *strengths, begins[0], ends[0]]

    def _control(self, config: Any, name: str, value: Any) -> ControlFile:
        """Return what is on a canvas as the file that a ControlNet takes."""
        height, width = self.model.size()
        colors = _colors(config)
        # A thin line must not fall between the pixels of a small model, and classes must not be mixed.
        resampling = Image.Resampling.NEAREST if config.control_kind == "classes" else Image.Resampling.BOX
        image = painted(value, (height, width), colors[0]).resize((width, height), resampling)
        if config.control_kind == "classes":
            return ControlFile(name, _class_ids(image, colors))
        return ControlFile(name, image.convert("L") if config.control_kind == "masks" else image)


def as_value(image: Image.Image) -> dict[str, Any]:
    """Return the value of a canvas with this background, on which nothing is painted."""
    return {"background": image, "layers": [], "composite": image}


def _names(config: Any) -> list[str]:
    """Return the names of the images that a ControlNet takes."""
    if config.control_kind == "masks":
        return [name.replace("_", " ") for name in config.control_names]
    return ["classes" if config.control_kind == "classes" else "control image"]


def _colors(config: Any) -> list[str]:
    """Return the colours of the brush, those of classes in their order; the first is that of an empty canvas."""
    if config.control_kind != "classes":
        return [BLACK, WHITE]
    return [hex_color(class_color(number)) for number in range(config.conditioning_channels)]


def _brushes(config: Any, colors: list[str]) -> list[str]:
    return colors[1:] + colors[:1]


def _legend(config: Any, colors: list[str]) -> str:
    """Return which colour of the brush stands for which class, as Markdown."""
    names = list(config.control_names)
    if len(names) != len(colors):
        names = list(COLOR_ROLES) if names == ["color_role"] and len(colors) == len(COLOR_ROLES) else []
    names = names or [f"class {number}" for number in range(len(colors))]
    swatch = '<span style="background:{0};border:1px solid gray">&emsp;</span> {1} ({0})'
    return "Colours: " + ", ".join(swatch.format(color, name) for color, name in zip(colors, names, strict=True))


def _class_ids(image: Image.Image, colors: list[str]) -> Image.Image:
    """Return the class of each pixel: the one whose colour is nearest, because a brush has soft edges."""
    table = np.array([[int(color[start : start + 2], 16) for start in (1, 3, 5)] for color in colors], dtype=np.int32)
    pixels = np.asarray(image, dtype=np.int32)
    distances = ((pixels[:, :, None] - table) ** 2).sum(axis=-1)
    return Image.fromarray(distances.argmin(axis=-1).astype(np.uint8))


def _is_plain(image: Image.Image) -> bool:
    return image.getcolors(1) is not None
