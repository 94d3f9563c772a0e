"""Control images as the tensors that a ControlNet takes, and when it steers.

Shapes: B pictures, C control channels, H W pixels.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .pixels import pixel_channels, to_rgb


def control_tensor(config: Any, control: Any, height: int, width: int) -> Tensor:
    """One control, or several in a list or batch, as B C H W in [0, 1], float32.

    Args:
        config: the ControlNet's: `control_kind` and `conditioning_channels`.
        control: a tensor (C H W or B C H W, in [0, 1]), or pictures of H × W pixels: in colour where the kind is
            "image"; of class ids (grey or with a palette) where it is "classes"; where it is "masks", C grey pictures
            for one control, or a list of such lists (with C = 1 a picture, or a list of pictures).

    Raises:
        ValueError: another size, number of channels or range, or a class id beyond the classes.
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
    """The controls of a list, each as its pictures."""
    if isinstance(control, Image.Image):
        return [[control]]
    if not isinstance(control, Sequence) or isinstance(control, str) or not control:
        raise ValueError(f"`control_image` must be a picture, a list of them or a tensor, but is {control!r}")
    if all(isinstance(one, Image.Image) for one in control):
        return [list(control)] if kind == "masks" and channels > 1 else [[one] for one in control]
    if all(isinstance(one, (list, tuple)) for one in control):
        return [list(one) for one in control]
    raise ValueError("`control_image` mixes pictures and lists of pictures")


def _one(kind: str, channels: int, pictures: list[Image.Image]) -> Tensor:
    """C H W in [0, 1]."""
    expected = channels if kind == "masks" else 1
    if len(pictures) != expected:
        raise ValueError(f"`control_image` must have {expected} pictures for each control, but has {len(pictures)}")
    if kind == "classes":
        ids = torch.from_numpy(_class_ids(pictures[0]))
        beyond = ids[(ids >= channels) & (ids != 255)]
        if len(beyond):
            raise ValueError(f"`control_image` has class id {int(beyond[0])}; the model knows 0 to {channels - 1}")
        return torch.stack([ids == c for c in range(channels)]).float()
    sizes = {one.size for one in pictures}
    if len(sizes) > 1:
        raise ValueError(f"the images of one control must be of one size, but are {sorted(sizes)} (width, height)")
    return pixel_channels(*(to_rgb(one).convert("RGB" if kind == "image" else "L") for one in pictures)).float() / 255


def _class_ids(picture: Image.Image) -> np.ndarray:
    """H W, int64; palettes are not applied, black and white are 0 and 1, as in training."""
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
        raise ValueError(
            f"`control_image` has colours (mode {picture.mode}), not one class id per pixel; save it as 8-bit grey"
        )
    return np.array(picture).astype(np.int64)


def step_share(timesteps: Tensor, timestep: Any) -> tuple[float, float]:
    """Where in sampling the step at `timestep` lies: its start and end, as shares of all steps in [0, 1]."""
    steps = torch.unique_consecutive(timesteps.detach().float().cpu())  # second-order samplers name each step twice
    number = int((steps - float(timestep)).abs().argmin())
    return number / len(steps), (number + 1) / len(steps)


def per_net(name: str, value: Any, count: int) -> list[Any]:
    """`value` for each of `count` ControlNets: one for all, or a list of as many.

    Raises:
        ValueError: a list of another length.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"`{name}` has {len(values)} entries for {count} ControlNets")
    return values
