"""Control images from files, for `sample.py`: which files go to which ControlNet, and what to do about their sizes.

Shapes: C control channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, ImageOps

from .cli import UserError
from .files import read_image

if TYPE_CHECKING:
    from torch import Tensor


class ControlFile(NamedTuple):
    """A picture, and the file that it comes from."""

    name: str
    picture: Image.Image


def open_controls(files: Sequence[str]) -> list[ControlFile]:
    """The pictures, decoded and upright.

    Raises:
        UserError: a file that is not there, or no picture.
    """
    pictures = [read_image(Path(file).expanduser(), f"--control_image {file}") for file in files]
    return [ControlFile(file, ImageOps.exif_transpose(picture)) for file, picture in zip(files, pictures)]


def controls_of(
    pipeline: Any, files: Sequence[ControlFile], height: int | None, width: int | None
) -> list[list[Tensor]]:
    """The controls that `files` hold, one after another; each a tensor (C H W, in [0, 1]) for every ControlNet of
    `pipeline`, in their order.

    A net of masks takes as many files as it has channels, any other one file.

    Args:
        height, width: of what is to be painted; None is the size that the model was trained at.

    Raises:
        UserError: a number of files that makes no whole controls, pictures of another shape, or what a net cannot use.
    """
    from ..models.fusion_controlnet import as_nets

    try:
        height, width = pipeline._size(height, width)
    except ValueError as error:
        raise UserError(str(error)) from error
    nets = as_nets(pipeline.controlnet)
    wanted = [net.config.conditioning_channels if net.config.control_kind == "masks" else 1 for net in nets]
    if len(files) % sum(wanted):
        raise UserError(
            f"--control_image has {len(files)} files, but this model takes {sum(wanted)} for each control: "
            f"{', then '.join(_description(net.config) for net in nets)}"
        )
    waiting = iter(files)
    return [
        [_tensor(net.config, [next(waiting) for _ in range(count)], height, width) for net, count in zip(nets, wanted)]
        for _ in range(len(files) // sum(wanted))
    ]


def _description(config: Any) -> str:
    """What a net takes, in words."""
    count, names = config.conditioning_channels, ", ".join(config.control_names)
    if config.control_kind == "masks":
        return f"{count} grey pictures ({names})" if count > 1 else f"a grey picture ({names})"
    return f"a picture of class ids (0 to {count - 1})" if config.control_kind == "classes" else "a picture in colour"


def _tensor(config: Any, files: Sequence[ControlFile], height: int, width: int) -> Tensor:
    """C H W in [0, 1]."""
    from ..common.control_images import control_tensor

    pictures = [_fitted(file, config.control_kind, height, width) for file in files]
    try:
        return control_tensor(config, pictures, height, width)[0]
    except ValueError as error:
        raise UserError(f"--control_image {' '.join(file.name for file in files)}: {error}") from error


def _fitted(file: ControlFile, kind: str, height: int, width: int) -> Image.Image:
    """The picture at the size that is painted: class ids and masks keep their values, colours are averaged."""
    name, picture = file
    if picture.size == (width, height):
        return picture
    size = f"{picture.width}×{picture.height}"
    if picture.width * height != picture.height * width:
        raise UserError(
            f"--control_image {name} is {size} pixels, and what is painted {width}×{height}: cut it to that shape, or "
            "paint another with --width and --height"
        )
    print(f"{name} is {size} pixels; it is scaled to {width}×{height}.")
    if kind != "image":
        return picture.resize((width, height), Image.Resampling.NEAREST)
    if picture.mode in ("1", "P"):  # of which Pillow can only pick pixels
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    return picture.resize((width, height), Image.Resampling.LANCZOS)
