"""Text, class label and a control image to image: a latent diffusion model steered by one ControlNet or several.

Shapes: B pictures, C control channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DConditionModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .common.controlled import ControlledMixin
from .latent_diffusion import LatentDiffusionPipeline


class FusionControlNetPipeline(ControlledMixin, LatentDiffusionPipeline):
    """`LatentDiffusionPipeline` with a control image; without one it gives what that gives.

    Args:
        controlnet: FusionControlNetModel, a list of them, or FusionControlNets; several fuse one after another in this
            order. The other arguments are those of `LatentDiffusionPipeline`.

    Raises:
        ValueError: a ControlNet of another U-Net or VAE.
    """

    model_cpu_offload_seq = "text_encoder->caption_prior->controlnet->unet->vae"
    controlnet: Any

    def __init__(
        self,
        vae: ModelMixin,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        controlnet: ModelMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prediction_type: str | None = None,
        id2label: dict | None = None,
        max_text_length: int | None = None,
        caption_prior: ModelMixin | None = None,
    ):
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
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Generate images, `num_images_per_prompt` for each prompt (or label, or control), in that order.

        Args:
            **options: how the control steers (`controlnet_conditioning_scale`, `control_guidance_start`,
                `control_guidance_end`), which like `control_image` is explained at `call_with_control`; and the
                arguments of `LatentDiffusionPipeline`.

        Raises:
            ValueError: an argument that cannot be used; the message quotes it.
        """
        return self.call_with_control({"prompt": prompt, "class_labels": class_labels}, control_image, **options)
