"""What the pipelines with a ControlNet share: checks, control tensors, and steering while the base pipeline samples.

Shapes: B pictures, C control channels, H W pixels.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..models.fusion_controlnet import FusionControlNets, as_nets, steering
from .control_images import control_tensor, per_net, step_share


class ControlledMixin:
    """Name it before the base pipeline's class, which stays as it is: the U-Net is steered from outside."""

    controlnet: Any
    unet: Any
    scheduler: Any

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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
