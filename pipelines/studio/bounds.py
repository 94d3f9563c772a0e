"""What the studio accepts, and errors in plain words.

Everything that comes from a browser is checked here again: a request can be written by hand.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..common.pixels import to_rgb
from ..tools.cli import UserError, one_line, printable
from ..tools.files import known_formats, open_image_file, read_image

MOST_STEPS = 200
MOST_IMAGES = 16
MOST_GUIDANCE = 20.0
MOST_PROMPT_CHARACTERS = 1000
MOST_SEED = 2**32 - 1
MOST_SIDE_FACTOR = 2
"""Width and height are at most this factor times the size of the training."""
UPLOAD_MB = 20
MOST_UPLOAD_PIXELS = 40_000_000
MOST_CANVAS_SIDE = 1024
"""Longest side of what arrives from a canvas: twice that of the canvas in the page."""
MOST_LAYERS = 4
"""Number of layers of a canvas; the page has one."""
MESSAGE_SECONDS = 30
"""How long a message stays: ten seconds, as Gradio has it, are too short for a screen reader or a slow reader."""
MOST_WAITING = 16
"""Number of requests in the queue; a further one is refused."""

LABELS = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "class_labels": "Class",
    "num_images_per_prompt": "Number of images",
    "generator": "Seed",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance scale",
    "height": "Height in pixels",
    "width": "Width in pixels",
    "strength": "Strength",
    "paste_back": "Keep all other pixels exactly",
    "jump_n_sample": "Repetitions of each step",
    "controlnet_conditioning_scale": "Strength of the control",
    "control_guidance_start": "Starts at this share of the steps",
    "control_guidance_end": "Ends at this share of the steps",
    "num_beams": "Beams",
}
"""The labels of the page for arguments of the pipelines, whose messages name the arguments."""


def in_range(name: str, value: Any, least: float, most: float) -> float:
    """Return a number from the browser. Raises UserError if it is none, or out of range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} must be a number from {least:g} to {most:g}; it is {value!r}")
    if not least <= value <= most:
        raise UserError(f"{name} must be from {least:g} to {most:g}; it is {value:g}")
    return value


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Return a whole number from the browser. Raises UserError."""
    number = in_range(name, value, least, most)
    if number != int(number):
        raise UserError(f"{name} must be a whole number; it is {number:g}")
    return int(number)


def text_of(name: str, value: Any) -> str:
    """Return a text from the browser without spaces around it. Raises UserError if it is too long."""
    text = str(value or "").strip()
    if len(text) > MOST_PROMPT_CHARACTERS:
        raise UserError(f"{name} has {len(text):,} characters, and {MOST_PROMPT_CHARACTERS:,} are allowed; shorten it")
    return text


def upload(path: str | Path | None) -> Image.Image:
    """Read an image that somebody has uploaded, upright and in RGB.

    Raises:
        UserError: It is missing, damaged, not an image, or has too many pixels.
    """
    check_upload(path)
    return to_rgb(read_image(Path(path or ""), "the uploaded file"))


def check_upload(path: str | Path | None) -> None:
    """Check that a file that somebody has uploaded is an image within the limits, without decoding it.

    Raises:
        UserError: It is missing, damaged, not an image, or has too many pixels.
    """
    width, height = _size_of(path)
    if width * height > MOST_UPLOAD_PIXELS:
        raise UserError(
            f"the image has {width:,} × {height:,} pixels, and at most {MOST_UPLOAD_PIXELS // 1_000_000} million are "
            "allowed; make it smaller"
        )


def drawing(path: str | Path | None) -> Image.Image:
    """Read the background or a layer of a canvas, RGBA.

    Raises:
        UserError: It is missing, damaged, not an image, or larger than a canvas.
    """
    width, height = _size_of(path)
    if max(width, height) > MOST_CANVAS_SIDE:
        raise UserError(
            f"the image on the canvas has {width:,} × {height:,} pixels, and at most {MOST_CANVAS_SIDE:,} per side are "
            "allowed; upload it beside the canvas, where it is made smaller"
        )
    return read_image(Path(path or ""), "the image on the canvas").convert("RGBA")


def _size_of(path: str | Path | None) -> tuple[int, int]:
    """Return width and height of an uploaded image from its header, without decoding it. Raises UserError."""
    if not path:
        raise UserError("no image is chosen; upload one first")
    try:
        with open_image_file(path) as header:
            return header.size
    except (OSError, ValueError, SyntaxError) as error:
        if "million" in str(error):  # the limit of all files
            raise UserError(
                f"the image has far too many pixels; at most {MOST_UPLOAD_PIXELS // 1_000_000} million are allowed"
            ) from None
        raise UserError(
            "the file cannot be read as an image; upload a PNG, JPEG or WebP file that another program can open"
        ) from None


def forbid_rare_formats() -> None:
    """Let Pillow open the formats of `known_formats` only in this process: Gradio opens what is painted by itself."""
    Image.init()
    known = [name for name in Image.ID if name in known_formats()]
    Image.ID[:] = known


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that the browser calls: its errors become messages in the page, and the studio goes on."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def yielding(*arguments: Any) -> Iterator[Any]:
            try:
                yield from function(*arguments)
            except gr.Error:
                raise
            except Exception as error:
                raise message_of(error) from error

        return yielding

    @functools.wraps(function)
    def returning(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except gr.Error:
            raise
        except Exception as error:
            raise message_of(error) from error

    return returning


def message_of(error: Exception) -> gr.Error:
    """Return an error as a message for the page; the terminal shows a traceback of those that nobody expected.

    Arguments of a pipeline are named by their labels, and uploaded files by their names, not by their paths.
    """
    expected = isinstance(error, (UserError, ValueError, OSError, MemoryError))
    cause = error.__cause__
    if isinstance(error, UserError) and str(error).startswith("--") and isinstance(cause, OSError) and cause.strerror:
        error = cause  # the words about a flag would be those of the command line
    out_of_memory = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
    if out_of_memory:
        text = "there is not enough memory for this; generate fewer or smaller images"
    elif isinstance(error, OSError) and error.strerror:
        advice = "check that there is free space, and that the folder of the model still exists"
        text = f"a file cannot be read or written ({error.strerror}); {advice}"
    else:
        text = one_line(in_words_of_the_page(printable(error)), 600) or type(error).__name__
        text = text if expected else f"something went wrong ({text}); the terminal of the studio shows details"
    return gr.Error(
        text[:1].upper() + text[1:], title="Not possible", duration=MESSAGE_SECONDS,
        print_exception=not (expected or out_of_memory),
    )  # fmt: skip


def in_words_of_the_page(text: str) -> str:
    """Return a message with labels in the place of `arguments`, and without the folder of uploaded files."""

    def label(match: re.Match[str]) -> str:
        name = match[1]
        return f"'{LABELS[name]}'" if name in LABELS else name.replace("_", " ")

    uploads = os.environ.get("GRADIO_TEMP_DIR")
    if uploads:  # each file is in a folder of its own, whose name is a checksum
        text = re.sub(re.escape(uploads) + r"[\\/](?:[^\\/\s]+[\\/])?", "", text)
    return re.sub(r"`([a-z][a-z_]*)`", label, text)
