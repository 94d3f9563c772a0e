"""Design brief and a control image to poster: the poster decoder steered by one ControlNet or several, in pixels.

Shapes: B pictures, C control channels, H W pixels.
"""

from __future__ import annotations

from typing import Any

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

    def __call__(self, briefs: Any = None, control_image: Any = None, **options: Any) -> ImagePipelineOutput | tuple:  # type: ignore[override]
        """Generate posters, `num_images_per_prompt` for each brief (or control), in that order.

        `control_image`, and in `options` how it steers: see `call_with_control`. The other options are those of
        `PosterDecoderPipeline`.
        """
        return self.call_with_control({"briefs": as_briefs(briefs)}, control_image, **options)
