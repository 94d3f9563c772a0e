"""Read control images from files for `sample.py`: assign files to ControlNets and resize them.

Shapes: C control channels, H W pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from .cli import UserError
from .files import read_image

if TYPE_CHECKING:
    from torch import Tensor


class ControlFile(NamedTuple):
    """A control image and the name of its file."""

    name: str
    image: Image.Image


STEERING = {
    "controlnet_conditioning_scale": "Strength of the control; 0 disables it (default: 1)",
    "control_guidance_start": "Fraction of the steps at which the ControlNet starts applying (default: 0)",
    "control_guidance_end": "Fraction of the steps at which the ControlNet stops applying (default: 1)",
}


def add_control_options(parser: argparse.ArgumentParser) -> None:
    """Add --control_image and the options of STEERING."""
    group = parser.add_argument_group(
        "ControlNet options; for several ControlNets, give one value for all or one value per network"
    )
    files = (
        "Files of control images. A ControlNet for masks takes one file for each of its channels, any other ControlNet "
        "one file. A model that takes n files takes n for each row: the files of row 1, then those of row 2, ..."
    )
    group.add_argument("--control_image", nargs="+", action="extend", help=files)
    for name, text in STEERING.items():
        group.add_argument(f"--{name}", nargs="+", type=float, help=text)


def open_controls(files: Sequence[str]) -> list[ControlFile]:
    """Read control images, rotated as their EXIF orientation says.

    Raises:
        UserError: If a file does not exist or is not an image.
    """
    from ..common.pixels import upright

    images = [read_image(Path(file).expanduser(), f"--control_image {file}") for file in files]
    return [ControlFile(file, upright(image)) for file, image in zip(files, images)]


def controls_of(
    pipeline: Any, files: Sequence[ControlFile], height: int | None, width: int | None
) -> list[list[Tensor]]:
    """Convert files to controls. Each control has one tensor (C H W, in [0, 1]) for each ControlNet of `pipeline`.

    A ControlNet for masks takes one file per channel, any other ControlNet one file.

    Args:
        files: The files of all controls, one control after another.
        height, width: Size in pixels of the generated images; None is the training size.

    Raises:
        UserError: If the last control is incomplete, an image has another aspect ratio, or a ControlNet rejects it.
    """
    from ..models.fusion_controlnet import as_nets

    try:
        height, width = pipeline._size(height, width)
    except ValueError as error:
        raise UserError(str(error)) from error
    nets = as_nets(pipeline.controlnet)
    counts = [net.config.conditioning_channels if net.config.control_kind == "masks" else 1 for net in nets]
    if len(files) % sum(counts):
        raise UserError(
            f"--control_image has {len(files)} files, but this model takes {sum(counts)} for each control: "
            f"{', then '.join(_description(net.config) for net in nets)}"
        )
    rest = iter(files)
    return [
        [_tensor(net.config, [next(rest) for _ in range(count)], height, width) for net, count in zip(nets, counts)]
        for _ in range(len(files) // sum(counts))
    ]


def _description(config: Any) -> str:
    """Describe the files that a ControlNet takes."""
    count, names = config.conditioning_channels, ", ".join(config.control_names)
    if config.control_kind == "masks":
        return f"{count} grey images ({names})" if count > 1 else f"a grey image ({names})"
    return f"an image of class ids (0 to {count - 1})" if config.control_kind == "classes" else "a colour image"


def _tensor(config: Any, files: Sequence[ControlFile], height: int, width: int) -> Tensor:
    """Convert the files of one ControlNet to a tensor, C H W in [0, 1]."""
    from ..common.control_images import control_tensor

    images = [_resized(file, config.control_kind, height, width) for file in files]
    try:
        return control_tensor(config, images, height, width)[0]
    except ValueError as error:
        raise UserError(f"--control_image {' '.join(file.name for file in files)}: {error}") from error


def _resized(file: ControlFile, kind: str, height: int, width: int) -> Image.Image:
    """Resize a control image to the size of the generated images; class ids and masks keep their exact values."""
    from ..common.pixels import to_rgb

    name, image = file
    if image.size == (width, height):
        return image
    size = f"{image.width}×{image.height}"
    if image.width * height != image.height * width:
        raise UserError(
            f"--control_image {name} is {size} pixels, but the generated image is {width}×{height}, which has another "
            "aspect ratio; crop the control image, or set --width and --height"
        )
    print(f"{name} is {size} pixels; it is scaled to {width}×{height}.")
    if kind != "image":
        return image.resize((width, height), Image.Resampling.NEAREST)
    return to_rgb(image).resize((width, height), Image.Resampling.LANCZOS)
