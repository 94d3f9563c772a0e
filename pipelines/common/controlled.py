"""Shared by the pipelines with a ControlNet: their control arguments, and calls of the base pipeline with its U-Net
steered.

Shapes: B images, C control channels, H W pixels.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..models.fusion_controlnet import FusionControlNets, as_nets, steering
from .checks import check_numbers, check_positive_integers
from .conditions import as_list, broadcast, broadcast_rows
from .control_images import control_tensor, per_net, step_share
from .guidance import check_guide, denoiser_of


class ControlledMixin:
    """Adds control images to a base pipeline; without a control image, the result is that of the base pipeline.

    Name this class before that of the base pipeline, which needs no changes: hooks steer its U-Net from outside.
    """

    controlnet: Any
    unet: Any
    scheduler: Any
    _size: Any

    def set_controlnet(self, controlnet: Any) -> None:
        """Replace the ControlNet by a FusionControlNetModel, FusionControlNets, or a list of FusionControlNetModel.

        Raises:
            ValueError: the ControlNet was trained with another U-Net or VAE.
        """
        downsampling = getattr(self, "vae_scale_factor", 1)  # a base pipeline on pixels has no VAE
        if isinstance(controlnet, (list, tuple)):
            controlnet = FusionControlNets.of(list(controlnet))
        for net in as_nets(controlnet):
            for name in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
                mine, its = net.config[name], self.unet.config[name]
                if _plain(mine) != _plain(its):
                    raise ValueError(
                        f"`controlnet` was trained with another U-Net: its `{name}` is {mine}, but this U-Net's is "
                        f"{its}; use it with the base model that it was trained with"
                    )
            if net.downsampling != downsampling:
                raise ValueError(
                    f"`controlnet` takes {net.downsampling} pixels per latent cell, but the base has {downsampling}: "
                    "it was trained with another VAE; use it with the base model that it was trained with"
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
        """Call the base pipeline with its U-Net steered by `control_image`, and return its result.

        Args:
            conditions: the base pipeline's arguments that say what the images show, such as prompts. With several
                controls, each argument must have one entry, or one for each control.
            control_image: one control for all images, or one for each prompt (or one prompt for each control); see
                `control_images.control_tensor`. With several ControlNets, a list with an entry for each. With None, the
                U-Net is not steered.
            controlnet_conditioning_scale: how strongly a ControlNet steers; 0 gives the result of the base pipeline.
                This and the next two arguments are one number, or one for each ControlNet.
            control_guidance_start, control_guidance_end: the shares of the sampling steps, in [0, 1], between which the
                ControlNet steers.
            height, width, num_images_per_prompt, **options: arguments of the base pipeline.

        Raises:
            ValueError: an argument cannot be used; the message quotes it.
        """
        base = super().__call__  # type: ignore[misc]
        check_positive_integers(num_images_per_prompt=num_images_per_prompt)
        options |= {"height": height, "width": width}
        if control_image is None:
            return base(**conditions, num_images_per_prompt=num_images_per_prompt, **options)
        num_images_per_prompt = int(num_images_per_prompt)
        controls = self.control_tensors(control_image, *self._size(height, width))
        conditions, count = _for_each_control(len(controls[0]), conditions)
        controls = [control.repeat_interleave(num_images_per_prompt, dim=0) for control in controls]
        if count == 0:  # without conditions, the number of images is the number of controls
            num_images_per_prompt = len(controls[0])
        strength = (controlnet_conditioning_scale, control_guidance_start, control_guidance_end)
        with self.steered(controls, *strength, guide=options.get("guidance_model")):
            return base(**conditions, num_images_per_prompt=num_images_per_prompt, **options)

    def control_tensors(self, control_image: Any, height: int, width: int) -> list[Tensor]:
        """Convert the controls of each ControlNet to B C H W in [0, 1].

        Raises:
            ValueError: a control cannot be used, see `control_images.control_tensor`.
        """
        nets = as_nets(self.controlnet)
        controls = per_net("control_image", control_image, len(nets)) if len(nets) > 1 else [control_image]
        tensors = [
            control_tensor(net.config, control, height, width) for net, control in zip(nets, controls, strict=True)
        ]
        counts = {len(tensor) for tensor in tensors} - {1}
        if len(counts) > 1:
            raise ValueError(
                "every ControlNet needs one control, or as many controls as the others, but they have "
                f"{' and '.join(map(str, sorted(counts)))}"
            )
        count = max(counts, default=1)
        return [tensor.expand(count, -1, -1, -1) for tensor in tensors]

    @contextmanager
    def steered(
        self,
        controls: Sequence[Tensor],
        conditioning_scale: float | Sequence[float],
        guidance_start: float | Sequence[float],
        guidance_end: float | Sequence[float],
        guide: Any = None,
    ) -> Iterator[None]:
        """Context manager in which the U-Net is steered between two shares of the sampling steps.

        Args:
            guide: a guidance model, whose U-Net is steered as well, by its own ControlNets if it has any.

        Raises:
            ValueError: the shares are not increasing or not in [0, 1], or an argument is a list that does not have one
                entry for each ControlNet, or the guidance model is of another kind.
        """
        nets = as_nets(self.controlnet)
        scales = per_net("controlnet_conditioning_scale", conditioning_scale, len(nets))
        starts = per_net("control_guidance_start", guidance_start, len(nets))
        ends = per_net("control_guidance_end", guidance_end, len(nets))
        for scale, start, end in zip(scales, starts, ends, strict=True):
            check_numbers(controlnet_conditioning_scale=scale, control_guidance_start=start, control_guidance_end=end)
            if not 0 <= start < end <= 1:
                raise ValueError(
                    "`control_guidance_start` must be below `control_guidance_end`, both in [0, 1], but they are "
                    f"{start} and {end}"
                )

        def scale_of(net: int, timestep: Any) -> float:
            begins, ends_at = step_share(self.scheduler.timesteps, timestep)
            return float(scales[net]) if begins >= starts[net] and ends_at <= ends[net] else 0.0

        with ExitStack() as stack:
            for unet, its_nets in self._steered_networks(guide):
                stack.enter_context(
                    steering(unet, its_nets, [control.to(self.unet.device) for control in controls], scale_of)
                )
            yield

    def _steered_networks(self, guide: Any) -> list[tuple[Any, Sequence[Any]]]:
        """Return the U-Net, and that of a guidance model, with the ControlNets of each."""
        own, controlnet = (self.unet, as_nets(self.controlnet)), getattr(guide, "controlnet", self.controlnet)
        if guide is None:
            return [own]
        check_guide(self, guide)
        unet = denoiser_of(guide)
        if unet is not self.unet:
            return [own, (unet, as_nets(controlnet))]
        if controlnet is not self.controlnet:
            raise ValueError(
                "`guidance_model` has another ControlNet, but the same U-Net object, which cannot be steered by both; "
                "load the guidance model on its own, so that it has a copy"
            )
        return [own]


def _for_each_control(controls: int, conditions: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the conditions with one entry for each of several controls, and the number of entries of the longest one.

    This number is 0 if all conditions are None.

    Raises:
        ValueError: a condition has several entries, but not one for each control.
    """
    lists = {name: value if value is None or _has_rows(value) else as_list(value) for name, value in conditions.items()}
    lengths = {name: len(value) for name, value in lists.items() if value is not None}
    count = max(lengths.values(), default=0)
    if controls > 1 and count > 1 and count != controls:
        longest = max(lengths, key=lambda name: lengths[name])
        raise ValueError(
            f"`control_image` has {controls} controls, but `{longest}` has {count} entries; pass one entry, or one for "
            "each control"
        )
    if controls > 1 and count == 1:
        lists = {
            name: broadcast_rows(value, controls) if _has_rows(value) else value and broadcast(value, controls)
            for name, value in lists.items()
        }
    return lists, count


def _has_rows(value: Any) -> bool:
    """Whether `value` is a tensor of embeddings, B L D, and not one of class ids."""
    return isinstance(value, Tensor) and value.ndim > 1


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
