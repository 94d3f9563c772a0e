"""Components of the page: images that are checked when they arrive, canvases, and drawings that serve as examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw, ImageOps

from ..tools.cli import UserError
from .bounds import message_of, upload

CANVAS_SIDE = 512
"""Longer side of a canvas in pixels; what is painted is scaled to the size of the model."""


def picture(label: str) -> gr.Image:
    """Return a component for an uploaded image. It arrives as an RGB image, or as a message that says what is wrong."""
    return gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=320)


def _checked(component: gr.Image, payload: Any) -> Image.Image | None:
    """Read an uploaded image in the place of Gradio, which would open files of any format and size."""
    if payload is None:
        return None
    try:
        return upload(payload.path)
    except UserError as error:
        raise message_of(error) from error


# For the class, because Gradio makes its components again in each session, where an attribute of one component is lost.
# A subclass does not work either: the examples of Gradio 6 do not work with one, and a .pyi file is written beside it.
gr.Image.preprocess = _checked  # type: ignore[method-assign, assignment]


def canvas(label: str, colors: Sequence[str], value: Any = None) -> gr.ImageEditor:
    """Return a canvas to paint on. It has no upload of its own, because uploaded images are checked by `picture`."""
    brush = gr.Brush(default_size=24, colors=list(colors), default_color=colors[0], color_mode="fixed")
    return gr.ImageEditor(
        value, label=label, type="pil", format="png", sources=(), transforms=(), layers=False, brush=brush,
        eraser=gr.Eraser(default_size=24), canvas_size=(CANVAS_SIDE, CANVAS_SIDE), height=620,
    )  # fmt: skip


def on_canvas(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the centred part of an image with the aspect ratio of `size` (height, width), large enough to paint on."""
    height, width = size
    scale = CANVAS_SIDE / max(height, width)
    shown = (max(1, round(width * scale)), max(1, round(height * scale)))
    return ImageOps.fit(image, shown, Image.Resampling.LANCZOS)


def blank(size: tuple[int, int], color: str = "#000000") -> Image.Image:
    """Return an empty canvas with the aspect ratio of `size` (height, width)."""
    return on_canvas(Image.new("RGB", (size[1], size[0]), color), size)


def strokes(value: Any) -> Image.Image | None:
    """Return what was painted on a canvas, RGBA; None if nothing was."""
    layers = [layer for layer in (value or {}).get("layers", []) if layer is not None]
    painted = [layer.convert("RGBA") for layer in layers if layer.convert("RGBA").getchannel("A").getbbox()]
    if not painted:
        return None
    result = painted[0]
    for layer in painted[1:]:
        result = Image.alpha_composite(result, layer.resize(result.size))
    return result


def painted(value: Any, size: tuple[int, int], color: str = "#000000") -> Image.Image:
    """Return a canvas as one RGB image: its background, or a plain one if there is none, and what was painted."""
    background = (value or {}).get("background")
    result = blank(size, color) if background is None else background.convert("RGB")
    layer = strokes(value)
    if layer is not None:
        result.paste(layer.resize(result.size), mask=layer.resize(result.size).getchannel("A"))
    return result


def example_images(folder: Path) -> list[str]:
    """Draw the images that are offered as examples, and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in {"circle": _circle, "house": _house, "poster": _poster}.items():
        path = folder / f"{name}.png"
        draw().save(path)
        files.append(str(path))
    return files


def image_examples(files: Sequence[str], component: gr.Image, label: str) -> None:
    """Add buttons that put an example image into a component."""
    names = [Path(file).stem.capitalize() for file in files]
    gr.Examples([[file] for file in files], [component], label=label, example_labels=names)


def _circle() -> Image.Image:
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).ellipse((56, 56, 200, 200), fill="#d0202a")
    return image


def _house() -> Image.Image:
    image = Image.new("RGB", (256, 256), "#bfe3ff")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 190, 256, 256), fill="#58a05a")
    draw.rectangle((72, 120, 184, 210), fill="#f4d9a0")
    draw.polygon(((56, 124), (128, 60), (200, 124)), fill="#b0452f")
    draw.rectangle((116, 160, 142, 210), fill="#6b4226")
    return image


def _poster() -> Image.Image:
    image = Image.new("RGB", (256, 256), "#f6ecd6")
    draw = ImageDraw.Draw(image)
    draw.rectangle((24, 24, 232, 150), fill="#1e56be")
    draw.ellipse((80, 44, 170, 134), fill="#facc2a")
    for top, right in ((170, 220), (196, 180), (216, 200)):
        draw.rectangle((24, top, right, top + 12), fill="#1c1a1e")
    return image
