"""Converts control images to the tensors that a ControlNet takes, and locates a step within sampling.

Shapes: B images, C control channels, H W pixels.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .pixels import pixel_channels, to_rgb, upright


def control_tensor(config: Any, control: Any, height: int, width: int) -> Tensor:
    """Convert one control, or several in a list or batch, to B C H W in [0, 1], float32.

    Args:
        config: the ControlNet's config, of which `control_kind` and `conditioning_channels` are read.
        control: a tensor (C H W or B C H W, in [0, 1]), or PIL images that have H × W pixels after their EXIF
            orientation is applied. For the kind "image" they are
            colour images. For "classes" they are images of class ids (grey or with a palette). For "masks" they are a
            list of C grey images for one control, or a list of such lists; with C = 1 an image, or a list of images.

    Raises:
        ValueError: the size, the number of channels or the range is wrong, or a class id is too large.
    """
    kind, channels = config.control_kind, config.conditioning_channels
    if isinstance(control, Tensor):
        batch = control.float() if control.ndim == 4 else control.float()[None]
    else:
        batch = torch.stack([_one(kind, channels, one) for one in _separated(kind, channels, control)])
    if tuple(batch.shape[1:]) != (channels, height, width):
        raise ValueError(
            f"`control_image` must have {channels} channels of {height}×{width} (height × width), but has shape "
            f"{tuple(batch.shape[1:])}; resize it, or pass its `height` and `width`"
        )
    if not (batch.min() >= 0 and batch.max() <= 1):
        raise ValueError(f"`control_image` must lie in [0, 1], but lies in [{batch.min():.3g}, {batch.max():.3g}]")
    return batch


def _separated(kind: str, channels: int, control: Any) -> list[Any]:
    """Return a list with the images of each control."""
    if isinstance(control, Image.Image):
        return [[control]]
    if not isinstance(control, Sequence) or isinstance(control, str) or not control:
        raise ValueError(f"`control_image` must be an image, a list of images or a tensor, but is {control!r}")
    if all(isinstance(one, Image.Image) for one in control):
        return [list(control)] if kind == "masks" and channels > 1 else [[one] for one in control]
    if all(isinstance(one, (list, tuple)) for one in control):
        return [list(one) for one in control]
    raise ValueError("`control_image` mixes images and lists of images; pass a list of either")


def _one(kind: str, channels: int, images: list[Image.Image]) -> Tensor:
    """Convert the images of one control to C H W in [0, 1]."""
    expected = channels if kind == "masks" else 1
    if len(images) != expected:
        raise ValueError(f"`control_image` must have {expected} images for each control, but has {len(images)}")
    if kind == "classes":
        ids = torch.from_numpy(_class_ids(images[0]))
        beyond = ids[(ids >= channels) & (ids != 255)]
        if len(beyond):
            raise ValueError(f"`control_image` has class id {int(beyond[0])}; the model's ids are 0 to {channels - 1}")
        return torch.stack([ids == c for c in range(channels)]).float()
    sizes = {one.size for one in images}
    if len(sizes) > 1:
        raise ValueError(f"the images of one control must be of one size, but are {sorted(sizes)} (width, height)")
    return pixel_channels(*(to_rgb(one).convert("RGB" if kind == "image" else "L") for one in images)).float() / 255


def _class_ids(image: Image.Image) -> np.ndarray:
    """Read the class ids of an image, H W, int64.

    As in training, palettes are not applied, and black and white are 0 and 1.
    """
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise ValueError(
            f"`control_image` has colours (mode {image.mode}), not one class id per pixel; save it as 8-bit grey"
        )
    return np.array(upright(image)).astype(np.int64)


def step_share(timesteps: Tensor, timestep: Any) -> tuple[float, float]:
    """Return the start and the end of the step at `timestep`, as shares of all sampling steps in [0, 1]."""
    steps = torch.unique_consecutive(timesteps.detach().float().cpu())  # second-order samplers list steps twice
    number = int((steps - float(timestep)).abs().argmin())
    return number / len(steps), (number + 1) / len(steps)


def per_net(name: str, value: Any, count: int) -> list[Any]:
    """Return a list with one value for each of `count` ControlNets, from one value for all or from such a list.

    Raises:
        ValueError: the list has another length.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(
            f"`{name}` has {len(values)} entries for {count} ControlNets; pass one value, or one for each ControlNet"
        )
    return values
