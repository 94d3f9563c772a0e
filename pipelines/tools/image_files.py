"""Options of `sample.py` that start from an image: its file, a mask, and how much of it is changed."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from PIL import Image

from .cli import UserError
from .files import read_image

IMAGE_OPTIONS = ("image", "strength", "mask_image", "jump_n_sample", "paste_back")
"""Names of the options, which are those of the pipeline's arguments"""


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of IMAGE_OPTIONS."""
    group = parser.add_argument_group("options for an image to start from")
    add = group.add_argument
    add("--image", help="Image file to start from; it is resized to the size of the generated images")
    add(
        "--strength",
        type=float,
        help="How much of --image is changed: 0 nothing, 1 everything (default: 1 with a mask)",
    )
    add(
        "--mask_image",
        help="Image file of the size of --image, white where it is filled and black elsewhere; the rest of --image is "
        "kept",
    )
    add(
        "--jump_n_sample",
        type=int,
        help="How many times each step is taken with --mask_image, so that what is filled fits better (default: 1)",
    )
    add(
        "--paste_back",
        type=_true_or_false,
        metavar="{true,false}",
        help="Whether pixels outside of --mask_image are those of the file, instead of what the autoencoder makes of "
        "them (default: false)",
    )


def image_arguments(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return a pipeline's arguments for the options that are set, with the images read.

    Raises:
        UserError: A file cannot be read, an option lacks another one, or the pipeline does not start from images.
    """
    given = {name: getattr(options, name) for name in IMAGE_OPTIONS if getattr(options, name) is not None}
    if not given:
        return {}
    if options.image is None:
        raise UserError(f"--{next(iter(given))} has no effect without --image; add the image to start from")
    # A pipeline with a ControlNet passes its arguments on, but they are named in the class that checks them.
    if not any("strength" in inspect.signature(vars(one)["__call__"]).parameters for one in _callable(pipeline)):
        raise UserError(
            f"{type(pipeline).__name__} does not accept --image, because it starts from noise; leave it out"
        )
    for name in ("image", "mask_image"):
        if name in given:
            given[name] = read_image(Path(given[name]).expanduser(), f"--{name} {given[name]}")
    _say_if_stretched(pipeline, options, given["image"])
    return given


def image_facts(options: argparse.Namespace) -> dict[str, str]:
    """Return the options that are set as texts, for the metadata of a file; of files only the names."""
    given = {name: getattr(options, name) for name in IMAGE_OPTIONS if getattr(options, name) is not None}
    return {
        name: Path(value).name if isinstance(value, str) else str(value).lower() if value is True else f"{value:g}"
        for name, value in given.items()
        if value is not False
    }


def _callable(pipeline: Any) -> list[type]:
    return [one for one in type(pipeline).__mro__ if "__call__" in vars(one)]


def _say_if_stretched(pipeline: Any, options: argparse.Namespace, image: Image.Image) -> None:
    from ..common.pixels import upright

    try:
        height, width = pipeline._size(options.height, options.width)
    except ValueError as error:
        raise UserError(str(error)) from error
    shown = upright(image)
    if shown.width * height != shown.height * width:
        print(
            f"--image {options.image} is {shown.width}×{shown.height} pixels and is stretched to {width}×{height}; set "
            "--width and --height, or crop it, to keep its proportions."
        )


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"give true or false, not {text!r}")
    return text.lower() == "true"
