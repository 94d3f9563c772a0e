"""Components of the page: images that are checked when they arrive, and canvases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.components.base import server
from PIL import Image, ImageOps

from ..tools.cli import UserError
from .bounds import MOST_LAYERS, check_upload, drawing, message_of, plainly, upload

CANVAS_SIDE = 512
"""Longer side of a canvas in pixels; what is painted is scaled to the size of the model."""


def picture(label: str) -> gr.Image:
    """Return a component for an uploaded image. It arrives as an RGB image, or as a message that says what is wrong."""
    return gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=320)


def _checked(read: Callable[[Any], Any]) -> Callable[[gr.components.Component, Any], Any]:
    """Return a method that reads what a browser has sent in the place of Gradio, and turns errors into messages."""

    def preprocess(component: gr.components.Component, payload: Any) -> Any:
        return None if payload is None else plainly(read)(payload)

    return preprocess


def _uploaded_image(payload: Any) -> Image.Image:
    return upload(payload.path)


def _uploaded_file(payload: Any) -> str:
    """Return the path of an image that is read later, after its size has been checked."""
    check_upload(payload.path)
    return payload.path


def _canvas_value(payload: Any) -> dict[str, Any]:
    """Return the background and the layers of a canvas as RGBA images; the composite is not needed, nor read."""
    if len(payload.layers) > MOST_LAYERS:
        raise UserError(f"a canvas has at most {MOST_LAYERS} layers, but {len(payload.layers):,} were sent; use fewer")
    background = None if payload.background is None else drawing(payload.background.path)
    return {"background": background, "layers": [drawing(layer.path) for layer in payload.layers], "composite": None}


@server
def _no_blobs(component: gr.ImageEditor, data: Any) -> None:
    """Keep nothing of a drawing that is sent before it is used: the page does not do that, and it could be any size."""


_move_to_cache = Block.async_move_resource_to_block_cache


async def _without_addresses(block: Block, path: str | Path | None) -> str | None:
    """Refuse an address in the place of a file: Gradio would fetch it, whatever its size."""
    if str(path).lower().startswith(("http://", "https://")):
        raise message_of(UserError("a file from another address is not fetched; upload the file instead"))
    return await _move_to_cache(block, path)


# For the class, because Gradio makes its components again in each session, where an attribute of one component is lost.
# A subclass does not work either: the examples of Gradio 6 do not work with one, and a .pyi file is written beside it.
# Gradio itself would open files of any format and size.
gr.Image.preprocess = _checked(_uploaded_image)  # type: ignore[method-assign, assignment]
gr.ImageEditor.preprocess = _checked(_canvas_value)  # type: ignore[method-assign, assignment]
gr.ImageEditor.accept_blobs = _no_blobs  # type: ignore[method-assign]
gr.File.preprocess = _checked(_uploaded_file)  # type: ignore[method-assign, assignment]
Block.async_move_resource_to_block_cache = _without_addresses  # type: ignore[method-assign]


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
