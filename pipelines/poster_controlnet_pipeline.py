"""Design brief and a control image to poster: the poster decoder steered by one ControlNet or several, in pixels.

Shapes: B pictures, C control channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DConditionModel

from .common.controlled import ControlledMixin
from .poster_decoder import PosterDecoderPipeline, as_briefs


class PosterControlNetPipeline(ControlledMixin, PosterDecoderPipeline):
    """`PosterDecoderPipeline` with a control image; without one it gives what that gives.

    Args:
        controlnet: FusionControlNetModel, a list of them, or FusionControlNets; several fuse one after another in this
            order. The other arguments are those of `PosterDecoderPipeline`.

    Raises:
        ValueError: a ControlNet of another U-Net.
    """

    model_cpu_offload_seq = "brief_encoder->controlnet->unet"
    controlnet: Any

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        brief_encoder: ModelMixin,
        controlnet: ModelMixin,
        prediction_type: str | None = None,
    ):
        super().__init__(unet=unet, scheduler=scheduler, brief_encoder=brief_encoder, prediction_type=prediction_type)
        self.set_controlnet(controlnet)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        briefs: Any = None,
        control_image: Any = None,
        *,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Paint posters, `num_images_per_prompt` for each brief (or control), in that order.

        Args:
            control_image: one control for all posters, or one for each brief (or one brief for each control): see
                `control_images.control_tensor`. With several ControlNets a list with an entry for each. None steers
                nothing.
            controlnet_conditioning_scale: how strongly; 0 gives what the base model gives.
            control_guidance_start, control_guidance_end: steer between these shares of the steps, in [0, 1].
            **options: those of `PosterDecoderPipeline`.

        Raises:
            ValueError: an argument that cannot be used; the message quotes it.
        """
        shared = {"height": height, "width": width, "num_images_per_prompt": num_images_per_prompt, **options}
        if control_image is None:
            return super().__call__(briefs, **shared)
        controls = self.control_tensors(control_image, *self._size(height, width))
        asked, count = as_briefs(briefs), len(controls[0])
        if len(asked) > 1 and count > 1 and len(asked) != count:
            raise ValueError(f"`control_image` has {count} controls for {len(asked)} briefs")
        asked = asked * count if len(asked) == 1 else asked
        controls = [c.repeat_interleave(num_images_per_prompt, dim=0) for c in controls]
        with self.steered(controls, controlnet_conditioning_scale, control_guidance_start, control_guidance_end):
            return super().__call__(asked, **shared)
