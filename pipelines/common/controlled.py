"""What the pipelines with a ControlNet share: their arguments of control, and the base pipeline's call with the U-Net
steered.

Shapes: B pictures, C control channels, H W pixels.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..models.fusion_controlnet import FusionControlNets, as_nets, steering
from .control_images import control_tensor, per_net, step_share


class ControlledMixin:
    """The base pipeline with control images; without one it gives what the base gives.

    Name it before the base pipeline's class, which stays as it is: the U-Net is steered from outside.
    """

    controlnet: Any
    unet: Any
    scheduler: Any
    _size: Any

    def set_controlnet(self, controlnet: Any) -> None:
        """Put a FusionControlNetModel, FusionControlNets, or a list of the former in the place of what is there.

        Raises:
            ValueError: a ControlNet of another U-Net or VAE.
        """
        downsampling = getattr(self, "vae_scale_factor", 1)  # a base of pixels has no VAE
        if isinstance(controlnet, (list, tuple)):
            controlnet = FusionControlNets.of(list(controlnet))
        for net in as_nets(controlnet):
            for name in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
                mine, its = net.config[name], self.unet.config[name]
                if _plain(mine) != _plain(its):
                    raise ValueError(f"`controlnet` is of another U-Net: its `{name}` is {mine}, the U-Net's {its}")
            if net.downsampling != downsampling:
                raise ValueError(
                    f"`controlnet` takes {net.downsampling} pixels per latent cell, but the base has {downsampling}: "
                    "it was trained with another VAE"
                )
        self.register_modules(controlnet=controlnet)  # type: ignore[attr-defined]

    @torch.no_grad()
    def call_with_control(
        self,
        conditions: Mapping[str, Any],
        control_image: Any = None,
        *,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> Any:
        """What the base pipeline's call returns, with its U-Net steered by `control_image`.

        Args:
            conditions: the base's arguments that say what the images show, such as its prompts; with several controls
                each must have one entry, or as many as there are controls.
            control_image: one control for all images, or one for each prompt (or one prompt for each control): see
                `control_images.control_tensor`. With several ControlNets a list with an entry for each. None steers
                nothing.
            controlnet_conditioning_scale: how strongly a ControlNet steers; 0 gives what the base model gives. This and
                the next two are one number, or one for each ControlNet.
            control_guidance_start, control_guidance_end: steer between these shares of the steps, in [0, 1].
            height, width, num_images_per_prompt, **options: those of the base pipeline.

        Raises:
            ValueError: an argument that cannot be used; the message quotes it.
        """
        base = super().__call__  # type: ignore[misc]
        options |= {"height": height, "width": width}
        if control_image is None:
            return base(**conditions, num_images_per_prompt=num_images_per_prompt, **options)
        controls = self.control_tensors(control_image, *self._size(height, width))
        conditions, count = _for_each_control(len(controls[0]), conditions)
        controls = [control.repeat_interleave(num_images_per_prompt, dim=0) for control in controls]
        if count == 0:  # only the controls say how many images there are
            num_images_per_prompt = len(controls[0])
        with self.steered(controls, controlnet_conditioning_scale, control_guidance_start, control_guidance_end):
            return base(**conditions, num_images_per_prompt=num_images_per_prompt, **options)

    def control_tensors(self, control_image: Any, height: int, width: int) -> list[Tensor]:
        """For each ControlNet its controls, B C H W in [0, 1].

        Raises:
            ValueError: what cannot be used, see `control_images.control_tensor`.
        """
        nets = as_nets(self.controlnet)
        controls = per_net("control_image", control_image, len(nets)) if len(nets) > 1 else [control_image]
        tensors = [
            control_tensor(net.config, control, height, width) for net, control in zip(nets, controls, strict=True)
        ]
        counts = {len(tensor) for tensor in tensors} - {1}
        if len(counts) > 1:
            raise ValueError(f"every ControlNet needs one control or equally many, but they have {sorted(counts)}")
        count = max(counts, default=1)
        return [tensor.expand(count, -1, -1, -1) for tensor in tensors]

    def steered(
        self,
        controls: Sequence[Tensor],
        scale: float | Sequence[float],
        start: float | Sequence[float],
        end: float | Sequence[float],
    ) -> AbstractContextManager[None]:
        """A context in which the U-Net is steered, from the share `start` of the steps to the share `end`.

        Raises:
            ValueError: shares that are none, or as many scales as there are no ControlNets.
        """
        nets = as_nets(self.controlnet)
        scales = per_net("controlnet_conditioning_scale", scale, len(nets))
        starts = per_net("control_guidance_start", start, len(nets))
        ends = per_net("control_guidance_end", end, len(nets))
        for first, last in zip(starts, ends, strict=True):
            if not 0 <= first < last <= 1:
                raise ValueError(
                    "`control_guidance_start` must be below `control_guidance_end`, both in [0, 1], but they are "
                    f"{first} and {last}"
                )

        def scale_of(net: int, timestep: Any) -> float:
            begins, ends_at = step_share(self.scheduler.timesteps, timestep)
            return scales[net] if begins >= starts[net] and ends_at <= ends[net] else 0.0

        return steering(self.unet, nets, [control.to(self.unet.device) for control in controls], scale_of)


def _for_each_control(controls: int, conditions: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The conditions with one entry for each of several controls, and how many entries the longest one had (0: all are
    None).

    Raises:
        ValueError: several controls and several entries, but not equally many.
    """
    lists = {
        name: value if value is None or isinstance(value, (list, tuple, Tensor)) else [value]
        for name, value in conditions.items()
    }
    lengths = {name: len(value) for name, value in lists.items() if value is not None}
    count = max(lengths.values(), default=0)
    if controls > 1 and count > 1 and count != controls:
        longest = max(lengths, key=lambda name: lengths[name])
        raise ValueError(f"`control_image` has {controls} controls, but `{longest}` has {count} entries")
    if controls > 1 and count == 1:
        lists = {name: None if value is None else [value[0]] * controls for name, value in lists.items()}
    return lists, count


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
