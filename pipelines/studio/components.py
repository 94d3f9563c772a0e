"""Components of the page: images that are checked when they arrive, and canvases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

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
