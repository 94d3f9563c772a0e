"""Text, class label and a control image to image: a latent diffusion model steered by one ControlNet or several.

Shapes: B pictures, C control channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        control_image: Any = None,
        *,
        class_labels: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Generate images, `num_images_per_prompt` for each prompt (or label, or control), in that order.

        Args:
            control_image: one control for all pictures, or one for each prompt (or one prompt for each control): see
                `control_images.control_tensor`. With several ControlNets a list with an entry for each. None steers
                nothing.
            controlnet_conditioning_scale: how strongly; 0 gives what the base model gives.
            control_guidance_start, control_guidance_end: steer between these shares of the steps, in [0, 1].
            **options: those of `LatentDiffusionPipeline`.

        Raises:
            ValueError: an argument that cannot be used; the message quotes it.
        """
        shared = {"height": height, "width": width, **options}
        if control_image is None:
            return super().__call__(prompt, class_labels, num_images_per_prompt=num_images_per_prompt, **shared)
        controls = self.control_tensors(control_image, *self._size(height, width))
        prompt, class_labels, count = _for_each(len(controls[0]), prompt, class_labels)
        controls = [control.repeat_interleave(num_images_per_prompt, dim=0) for control in controls]
        if count == 0:  # nothing but the controls says how many pictures there are
            num_images_per_prompt = len(controls[0])
        with self.steered(controls, controlnet_conditioning_scale, control_guidance_start, control_guidance_end):
            return super().__call__(prompt, class_labels, num_images_per_prompt=num_images_per_prompt, **shared)


def _for_each(controls: int, prompt: Any, class_labels: Any) -> tuple[Any, Any, int]:
    """Prompts and labels, one for each of `controls` where there is but one; and how many pictures they make (0: they
    say nothing of it).

    Raises:
        ValueError: several of both, and not equally many.
    """
    lists = [v if v is None or isinstance(v, (list, tuple, torch.Tensor)) else [v] for v in (prompt, class_labels)]
    count = max((len(v) for v in lists if v is not None), default=0)
    if controls > 1 and count > 1 and count != controls:
        raise ValueError(f"`control_image` has {controls} controls for {count} prompts or labels")
    if controls > 1 and count == 1:
        lists = [None if v is None else [v[0]] * controls for v in lists]
    return lists[0], lists[1], max(count, controls) if count else 0
