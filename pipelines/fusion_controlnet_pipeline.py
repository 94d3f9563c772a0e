"""Generate images from a prompt, a class label and a control image: latent diffusion with one or more ControlNets.

Shapes: B images, C control channels, H W pixels.
"""

from collections.abc import Sequence
from typing import Any, Optional

from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DConditionModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .common.controlled import ControlledMixin
from .latent_diffusion import LatentDiffusionPipeline


class FusionControlNetPipeline(ControlledMixin, LatentDiffusionPipeline):
    """Pipeline for latent diffusion with ControlNet guidance.

    Without a control image it generates the same images as `LatentDiffusionPipeline`.

    Args:
        controlnet (`FusionControlNetModel`, `list[FusionControlNetModel]` or `FusionControlNets`): One or more
            ControlNets; several are applied one after another, in this order.

    The other arguments are those of `LatentDiffusionPipeline`.

    Raises:
        ValueError: If a ControlNet was trained for another U-Net or VAE, or the base model has no U-Net.
    """

    model_cpu_offload_seq = "text_encoder->caption_prior->controlnet->unet->vae"
    controlnet: Any

    def __init__(
        self,
        vae: ModelMixin,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        controlnet: ModelMixin,
        text_encoder: Optional[PreTrainedModel] = None,
        tokenizer: Optional[PreTrainedTokenizerBase] = None,
        prediction_type: Optional[str] = None,
        id2label: Optional[dict] = None,
        max_text_length: Optional[int] = None,
        caption_prior: Optional[ModelMixin] = None,
        transformer: Optional[ModelMixin] = None,
    ):
        if unet is None or transformer is not None:
            raise ValueError(
                "the base model has a `transformer`, but a ControlNet steers a U-Net; pass a base with one"
            )
        super().__init__(
            vae=vae, unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer,
            prediction_type=prediction_type, id2label=id2label, max_text_length=max_text_length,
            caption_prior=caption_prior,
        )  # fmt: skip
        self.set_controlnet(controlnet)

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        control_image: Any = None,
        *,
        class_labels: Any = None,
        prompt_embeds: Any = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Generate `num_images_per_prompt` images for each prompt (or class label, or control image), in that order.

        Args:
            prompt (`str` or `list[str]`, *optional*): The prompt or prompts to guide image generation.
            control_image (*optional*): One control image for all images, or one for each prompt, as a tensor or PIL
                images (see `control_images.control_tensor`). With several ControlNets, a list with the control of each.
                By default, the base model generates without control.
            class_labels (`int`, `str`, `list` or `torch.Tensor`, *optional*): Names, or ids unless names are numbers.
            prompt_embeds (`torch.Tensor`, *optional*): Result of `encode_prompt` (`B L D`), instead of prompts.
            controlnet_conditioning_scale (`float` or `list[float]`, defaults to 1.0): Strength of the ControlNet; 0
                disables it. Several ControlNets share one value or have one each, here and in the next two arguments.
            control_guidance_start (`float` or `list[float]`, defaults to 0.0): Fraction of the sampling steps at which
                the ControlNet starts to apply.
            control_guidance_end (`float` or `list[float]`, defaults to 1.0): Fraction of the sampling steps at which
                the ControlNet stops applying.
            **options: The other arguments of `LatentDiffusionPipeline.__call__`.

        Returns:
            `ImagePipelineOutput` or `tuple`: The generated images; a tuple with them as its only element if
            `return_dict` is `False`.

        Raises:
            ValueError: If an argument is invalid; the message quotes it.
        """
        conditions = {"prompt": prompt, "class_labels": class_labels, "prompt_embeds": prompt_embeds}
        return self.call_with_control(conditions, control_image, **options)
