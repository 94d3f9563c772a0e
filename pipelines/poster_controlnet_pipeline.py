"""Generate posters from a design brief and a control image: the poster decoder with one or more ControlNets, in pixels.

Shapes: B images, C control channels, H W pixels.
"""

from typing import Any, Optional

from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DConditionModel

from .common.controlled import ControlledMixin
from .poster_decoder import PosterDecoderPipeline, as_briefs


class PosterControlNetPipeline(ControlledMixin, PosterDecoderPipeline):
    """Pipeline for generating posters with ControlNet guidance.

    Without a control image it generates the same posters as `PosterDecoderPipeline`.

    Args:
        controlnet (`FusionControlNetModel`, `list[FusionControlNetModel]` or `FusionControlNets`): One or more
            ControlNets; several are applied one after another, in this order.

    The other arguments are those of `PosterDecoderPipeline`.

    Raises:
        ValueError: If a ControlNet was trained for another U-Net.
    """

    model_cpu_offload_seq = "brief_encoder->controlnet->unet"
    controlnet: Any

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        brief_encoder: ModelMixin,
        controlnet: ModelMixin,
        prediction_type: Optional[str] = None,
        transformer: Optional[ModelMixin] = None,
    ):
        if unet is None or transformer is not None:
            raise ValueError(
                "the base model has a `transformer`, but a ControlNet steers a U-Net; pass a base with one"
            )
        super().__init__(unet=unet, scheduler=scheduler, brief_encoder=brief_encoder, prediction_type=prediction_type)
        self.set_controlnet(controlnet)

    def __call__(self, briefs: Any = None, control_image: Any = None, **options: Any) -> ImagePipelineOutput | tuple:  # type: ignore[override]
        """Generate `num_images_per_prompt` posters for each brief (or control image), in that order.

        Args:
            briefs (`dict`, `DesignBrief` or a list of them, *optional*): The design brief or briefs to guide
                generation.
            control_image (*optional*): One control image for all images, or one for each brief, as a tensor or PIL
                images (see `control_images.control_tensor`). With several ControlNets, a list with the control of each.
                By default, the base model generates without control.
            controlnet_conditioning_scale (`float` or `list[float]`, defaults to 1.0): Strength of the ControlNet; 0
                disables it. Several ControlNets share one value or have one each, here and in the next two arguments.
            control_guidance_start (`float` or `list[float]`, defaults to 0.0): Fraction of the sampling steps at which
                the ControlNet starts to apply.
            control_guidance_end (`float` or `list[float]`, defaults to 1.0): Fraction of the sampling steps at which
                the ControlNet stops applying.
            **options: The other arguments of `PosterDecoderPipeline.__call__`.

        Returns:
            `ImagePipelineOutput` or `tuple`: The generated posters; a tuple with them as its only element if
            `return_dict` is `False`.

        Raises:
            ValueError: If an argument is invalid; the message quotes it.
        """
        return self.call_with_control({"briefs": as_briefs(briefs)}, control_image, **options)
