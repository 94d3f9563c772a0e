"""Generate posters from design briefs with diffusion in pixel space.

Shapes: B images, L fields of a brief (tokens), D token width, E width of the global vector, H W pixels.

Conventions: images are in [-1, 1]. A brief is encoded as tokens, which the U-Net attends to, and as a global vector,
which is passed as its `class_labels` and added to the time embedding. In an empty brief every field is missing. Flow
matching is rectified flow as in Stable Diffusion 3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .common.checks import check_steps, side_multiple
from .common.design_brief import DesignBrief, brief_tensors
from .common.generation import SamplingOptions, UNetSamplingMixin, known_prediction_type, tensor_inputs_of
from .common.guidance import WHOLE_INTERVAL
from .common.lora import LoRAMixin
from .common.sampling import generator_per_image, initial_noise
from .common.standalone import StandalonePipelineMixin

Brief = DesignBrief | Mapping[str, Any]


class PosterDecoderPipeline(LoRAMixin, UNetSamplingMixin, StandalonePipelineMixin, DiffusionPipeline):
    """Pipeline for generating posters from design briefs with pixel-space diffusion.

    Classifier-free guidance (Ho and Salimans 2022) is uncond + scale * (cond - uncond), where uncond is the prediction
    for an empty brief. Both predictions are computed in one batch. `guidance_interval` limits guidance to noise levels
    with low < level <= high (Kynkäänniemi et al. 2024). The level is sigma / (alpha + sigma) of x_t = alpha x_0 + sigma
    noise: 0 for a clean poster, 1 for pure noise. Outside, only the conditional prediction is computed.

    With an integer as `generator`, poster k (from 0) uses the seed `generator + k`.

    The first poster uses a single `generator` itself, as if it were passed in a list. Every further poster has a random
    stream of its own, seeded from it, so that the first posters do not depend on their number.

    `callback_on_step_end` is called after each denoising step with `(pipeline, step, timestep, callback_kwargs)`, where
    `callback_kwargs` has the tensors named in `callback_on_step_end_tensor_inputs` (`"images"`, and `"prompt_embeds"`,
    the tokens of the briefs). The tensors that it returns in a dictionary replace the current ones. It may set
    `pipeline._guidance_scale`, and `pipeline._interrupt = True` to end sampling.

    With an `image` (PIL, or a tensor in [0, 1], resized to the size to generate) and a `strength`, sampling starts from
    it with the noise of that share of the steps: 0 gives the image itself, 1 a poster without it. With a `mask_image`
    of its size, only the white part is filled (`strength` is then 1 by default); each step is taken `jump_n_sample`
    times (RePaint: Lugmayr et al. 2022), and `paste_back` keeps all other pixels as they are in the file.

    Args:
        unet (`UNet2DConditionModel`): Denoises images, given the timestep, the tokens and the global vector of a
            brief; None for a model that has a `transformer` instead.
        scheduler (`SchedulerMixin`): Scheduler for the prediction type; `set_scheduler("ddim")` selects another.
        brief_encoder (`ModelMixin`): Encodes briefs to tokens (`B L D`) and global vectors (`B E`).
        prediction_type (`str`, *optional*): What the U-Net predicts: `"epsilon"`, `"v_prediction"`, `"sample"` or
            `"flow_prediction"`. Defaults to the prediction type of the scheduler.
        transformer (`ModelMixin`, *optional*): A transformer with the arguments of the U-Net, in its place.

    Raises:
        ValueError: If the prediction type is unknown, or if there is not one network that denoises.
    """

    model_cpu_offload_seq = "brief_encoder->unet->transformer"
    _optional_components = ["unet", "transformer"]
    _callback_tensor_inputs = ["images", "prompt_embeds"]
    scheduler: Any
    transformer: Any = None

    def __init__(
        self,
        unet: Optional[UNet2DConditionModel],
        scheduler: SchedulerMixin,
        brief_encoder: ModelMixin,
        prediction_type: Optional[str] = None,
        transformer: Optional[ModelMixin] = None,
    ):
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("pass either `unet` or `transformer`, the network that denoises")
        prediction_type = known_prediction_type(prediction_type, scheduler)
        self.register_modules(unet=unet, scheduler=scheduler, brief_encoder=brief_encoder, transformer=transformer)
        self.register_to_config(prediction_type=prediction_type)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._own_scheduler = scheduler

    @property
    def denoiser(self) -> Any:
        """The network that denoises: the U-Net or the transformer."""
        return self.unet if self.transformer is None else self.transformer

    @torch.no_grad()
    def __call__(
        self,
        briefs: Brief | Sequence[Brief] | None = None,
        height: int | None = None, width: int | None = None,
        num_inference_steps: int = 50, guidance_scale: float = 2.0, num_images_per_prompt: int = 1,
        generator: int | torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("images",),
        timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None,
        guidance_interval: Sequence[float] = WHOLE_INTERVAL,
        image: Any = None, mask_image: Any = None, strength: float | None = None,
        jump_n_sample: int | None = None, paste_back: bool = False,
    ) -> ImagePipelineOutput | tuple:  # fmt: skip
        """Generate `num_images_per_prompt` posters for each brief, in that order.

        Args:
            briefs (`dict`, `DesignBrief` or a list of them, *optional*): Design briefs to guide generation,
                such as `{"style": "swiss", "palette": ["#d33", "white"]}`. The model chooses freely whatever a missing
                field would set; by default all fields are missing.
            height, width (`int`, *optional*): Size in pixels of the generated posters. Defaults to the training size.
            num_inference_steps (`int`, defaults to 50): The number of denoising steps.
            guidance_scale (`float`, defaults to 2.0): Scale of classifier-free guidance, which is disabled at 1 and
                below, or if all briefs are empty.
            num_images_per_prompt (`int`, defaults to 1): The number of posters to generate per brief.
            generator (`int`, `torch.Generator` or a list, *optional*): Seed or generator, or one for each poster.
            output_type (`str`, defaults to `"pil"`): `"pil"`; `"np"` (`B H W 3`) or `"pt"` (`B 3 H W`), both in [0, 1].
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end, callback_on_step_end_tensor_inputs: Callback after each step, see the class.
            timesteps, sigmas (`list`, *optional*): Custom schedule, from high to low, if the scheduler takes it.
            guidance_interval (`tuple`, defaults to (0, 1)): Noise levels (low, high) with guidance, see the class.
            image, strength, mask_image, jump_n_sample, paste_back: Poster to start from, or to fill, see the class.

        Returns:
            `ImagePipelineOutput` or `tuple`: The generated posters; a tuple of one element without `return_dict`.

        Raises:
            ValueError: If an argument is invalid; the message quotes it.
        """
        callback_tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            briefs, num_inference_steps, num_images_per_prompt, output_type, callback_tensor_inputs, height, width,
            guidance_scale, generator, callback_on_step_end, timesteps, sigmas, guidance_interval,
        )  # fmt: skip
        height, width = self._size(height, width)
        start = self._starting_image(
            image, mask_image, strength, jump_n_sample, paste_back, height, width, num_images_per_prompt, output_type
        )
        design_briefs = as_briefs(briefs)
        self._begin(guidance_scale, any(brief.to_dict() for brief in design_briefs))
        device, repeats = self._execution_device, int(num_images_per_prompt)
        tokens, vectors = self.encode_briefs(design_briefs, device, self.do_classifier_free_guidance, repeats)
        num_images = len(design_briefs) * repeats
        generators = generator_per_image(generator, num_images)
        noise = initial_noise((num_images, 3, height, width), generators, device)
        options = SamplingOptions(
            check_steps(self.scheduler, num_inference_steps, timesteps, sigmas), generators,
            callback_on_step_end, callback_tensor_inputs, guidance_interval, start,
        )  # fmt: skip
        return self._finished(self._denoise(noise, tokens, vectors, options), output_type, return_dict, start)

    def check_inputs(
        self,
        briefs: Any,
        num_inference_steps: Any,
        num_images_per_prompt: Any,
        output_type: Any,
        callback_on_step_end_tensor_inputs: Any,
        height: Any = None,
        width: Any = None,
        guidance_scale: Any = 1.0,
        generator: Any = None,
        callback_on_step_end: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        guidance_interval: Any = WHOLE_INTERVAL,
    ) -> None:
        """Raise a ValueError that quotes the first invalid argument and its value."""
        self._check_sampling(
            num_images_per_prompt, guidance_scale, generator, output_type, callback_on_step_end,
            callback_on_step_end_tensor_inputs, guidance_interval,
        )  # fmt: skip
        check_steps(self.scheduler, num_inference_steps, timesteps, sigmas)
        self._size(height, width)
        as_briefs(briefs)

    def encode_briefs(
        self, briefs: Sequence[DesignBrief], device: torch.device | str | None = None, guided: bool = False,
        repeats: int = 1,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Encode briefs to tokens (`B L D`) and global vectors (`B E`), in the denoiser's dtype.

        Each brief is repeated `repeats` times. With guidance the batch has twice the size, and the empty briefs come
        first.
        """
        empty = [DesignBrief()] * len(briefs) if guided else []
        tensors = brief_tensors([*empty, *briefs], device or self._execution_device)
        encoded = self.brief_encoder(**tensors)
        tokens, global_vectors = (part.to(self.denoiser.dtype).repeat_interleave(repeats, dim=0) for part in encoded)
        return tokens, global_vectors

    def _denoise(self, noise: Tensor, tokens: Tensor, global_vectors: Tensor, options: SamplingOptions) -> Tensor:
        """Denoise standard normal noise to images (B 3 H W, in [-1, 1]); with guidance, conditions have size 2B."""

        def predict(x: Tensor, timestep: Any, tokens: Tensor) -> Tensor:
            return self.denoiser(
                x,
                timestep,
                encoder_hidden_states=tokens,
                class_labels=global_vectors[-len(x) :],
                return_dict=False,
            )[0]

        return self._sample(noise, predict, options, {"prompt_embeds": tokens}, lambda prompt_embeds: (prompt_embeds,))

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        height, width = self._given_or_trained_size(height, width)
        step = side_multiple(self.denoiser)
        reason = "the U-Net's total downsampling" if self.transformer is None else "the transformer's patch size"
        for name, value in (("height", height), ("width", width)):
            if value < step or value % step:
                raise ValueError(f"`{name}` must be a multiple of {step} ({reason}), but is {value!r}")
        return height, width


def as_briefs(briefs: Any) -> list[DesignBrief]:
    """Convert the argument `briefs` to a list of DesignBrief; None becomes one empty brief.

    Raises:
        ValueError: If it is not a brief, mapping or list of them, if the list is empty, or if a field is invalid.
    """
    if briefs is None:
        return [DesignBrief()]
    several = list(briefs) if isinstance(briefs, (list, tuple)) else [briefs]
    if not several:
        raise ValueError(f"`briefs` must be one brief or more, but is {briefs!r}")
    # Check for `to_dict`, not for the class: a pipeline from the Hub has its own copy of design_brief.py.
    fields = [brief.to_dict() if hasattr(brief, "to_dict") else brief for brief in several]
    for values in fields:
        if not isinstance(values, Mapping):
            raise ValueError(f"`briefs` must be briefs or mappings of their fields, but has {values!r}")
    return [DesignBrief.from_mapping(values) for values in fields]
