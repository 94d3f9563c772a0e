"""Design brief to poster, in pixels: no latents and no captions.

Shapes: B pictures, L fields of a brief (tokens), D token width, E width of the global vector, H W pixels.

Conventions: pictures are in [-1, 1]; tokens are what attention looks at, the global vector is the U-Net's
`class_labels` and joins the time embedding; an absent brief is one whose every field is absent. Flow matching is
rectified flow as in Stable Diffusion 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .common.design_brief import DesignBrief, brief_tensors
from .common.generation import SamplingOptions, UNetSamplingMixin, known_prediction_type
from .common.sampling import generator_per_image, initial_noise
from .common.standalone import StandalonePipelineMixin

Brief = DesignBrief | Mapping[str, Any]


class PosterDecoderPipeline(UNetSamplingMixin, StandalonePipelineMixin, DiffusionPipeline):
    """Paints posters from design briefs.

    Args:
        unet: predicts what `prediction_type` says from noisy pictures, timestep, tokens and global vector.
        scheduler: sampler that suits the prediction type; `set_scheduler("ddim")` makes another.
        brief_encoder: brief tensors to tokens (B L D) and global vector (B E).
        prediction_type: epsilon, v_prediction, sample or flow_prediction; by default what the scheduler says.

    Raises:
        ValueError: an unknown prediction type.
    """

    model_cpu_offload_seq = "brief_encoder->unet"
    _callback_tensor_inputs = ["images"]
    scheduler: Any

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        brief_encoder: ModelMixin,
        prediction_type: str | None = None,
    ):
        super().__init__()
        prediction_type = known_prediction_type(prediction_type, scheduler)
        self.register_modules(unet=unet, scheduler=scheduler, brief_encoder=brief_encoder)
        self.register_to_config(prediction_type=prediction_type)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._own_scheduler = scheduler

    @torch.no_grad()
    def __call__(
        self,
        briefs: Brief | Sequence[Brief] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("images",),
    ) -> ImagePipelineOutput | tuple:
        """Paint posters: `num_images_per_prompt` for each brief, in that order.

        Args:
            briefs: one or several, as mappings of a brief's fields ({"style": "swiss", "palette": ["#d33", "white"]})
                or as DesignBrief; fields that are left out are open. None leaves everything open.
            height, width: pixels; by default the size the model was trained at.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022) away from the absent brief; both halves run
                in one batch; nothing is steered at 1 and below, or without a brief.
            generator: one for all (each picture gets a stream of its own from it, so that the first pictures do not
                depend on how many are asked for), or one for each picture.
            output_type: pil; np (B H W 3, in [0, 1]); or pt (B 3 H W, in [0, 1]).
            callback_on_step_end: called as f(pipeline, step, timestep, tensors) after each step; what it returns
                replaces `images` (B 3 H W). It may set `pipeline._interrupt = True` to end early.

        Raises:
            ValueError: an argument that cannot be used; the message quotes it.
        """
        height, width = self._size(height, width)
        self.check_inputs(
            briefs, num_inference_steps, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs
        )
        device = self._execution_device
        asked = as_briefs(briefs)
        guided = guidance_scale > 1 and any(brief.to_dict() for brief in asked)
        tokens, whole = self.encode_briefs(asked, device, guided, num_images_per_prompt)
        pictures = len(asked) * num_images_per_prompt
        generators = generator_per_image(generator, pictures)
        noise = initial_noise((pictures, 3, height, width), generators, device)
        options = SamplingOptions(
            num_inference_steps, guidance_scale if guided else None, generators,
            callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        return self._finished(self._denoise(noise, tokens, whole, options), output_type, return_dict)

    def check_inputs(
        self,
        briefs: Any,
        num_inference_steps: int,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise a ValueError that quotes the first argument that cannot be used, and its value."""
        self._check_sampling(
            num_inference_steps, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs
        )
        as_briefs(briefs)

    def encode_briefs(
        self, briefs: Sequence[DesignBrief], device: torch.device | str | None = None, guided: bool = False,
        repeats: int = 1,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Tokens (B L D) and global vectors (B E) of each brief `repeats` times, those of absent briefs first where
        `guided`; in the U-Net's dtype."""
        absent = [DesignBrief()] * len(briefs) if guided else []
        tensors = brief_tensors([*absent, *briefs], device or self._execution_device)
        encoded = self.brief_encoder(**tensors)
        tokens, whole = (part.to(self.unet.dtype).repeat_interleave(repeats, dim=0) for part in encoded)
        return tokens, whole

    def _denoise(self, noise: Tensor, tokens: Tensor, whole: Tensor, options: SamplingOptions) -> Tensor:
        """Standard normal noise to images in [-1, 1] (B 3 H W); conditions of B, or of 2B where guided."""

        def predict(x: Tensor, timestep: Any) -> Tensor:
            return self.unet(x, timestep, encoder_hidden_states=tokens, class_labels=whole, return_dict=False)[0]

        return self._sample(noise, predict, options)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        height, width = self._given_or_trained_size(height, width)
        step = 2 ** (len(self.unet.config.block_out_channels) - 1)
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, int) or value < step or value % step:
                raise ValueError(
                    f"`{name}` must be a multiple of {step} (the U-Net halves it so often), but is {value!r}"
                )
        return height, width


def as_briefs(briefs: Any) -> list[DesignBrief]:
    """Whatever `briefs` may be as a list of DesignBrief; None is one without any field.

    Raises:
        ValueError: something else, no brief at all, or a field that cannot be.
    """
    if briefs is None:
        return [DesignBrief()]
    several = list(briefs) if isinstance(briefs, (list, tuple)) else [briefs]
    if not several:
        raise ValueError(f"`briefs` must be one brief or more, but is {briefs!r}")
    # By their fields: a brief made by another copy of design_brief.py is as good.
    fields = [brief.to_dict() if hasattr(brief, "to_dict") else brief for brief in several]
    for values in fields:
        if not isinstance(values, Mapping):
            raise ValueError(f"`briefs` must be briefs or mappings of their fields, but has {values!r}")
    return [DesignBrief.from_mapping(values) for values in fields]
