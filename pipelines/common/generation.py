"""Shared by the pipelines that generate from noise: samplers by name, and sampling with a guided U-Net and a callback
after each step.

Shapes: B images, C channels, h w latent cells or pixels.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from .checks import OUTPUT_TYPES, check_output_type, check_positive_integers
from .sampling import denoise, guided
from .schedulers import PREDICTION_TYPES, check_scheduler, make_scheduler, noise_schedule_of, prediction_type_of


def known_prediction_type(prediction_type: str | None, scheduler: Any) -> str:
    """Return `prediction_type`, or that of `scheduler` if it is None.

    Raises:
        ValueError: the prediction type is unknown.
    """
    prediction_type = prediction_type or prediction_type_of(scheduler)
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {PREDICTION_TYPES}, but is '{prediction_type}'")
    return prediction_type


class SamplersByName:
    """Adds `set_scheduler` to a pipeline."""

    scheduler: Any
    # The scheduler that the pipeline was created with. It has the model's noise schedule, so samplers are built from it
    # and checked against it even after `scheduler` was replaced.
    _own_scheduler: Any

    def set_scheduler(self, name: str) -> None:
        """Use the sampler `name` (ddim, ddpm, dpm, dpm_sde, euler, euler_ancestral, unipc, heun, lms) from now on.

        It is built with the model's own prediction type and noise schedule.

        Raises:
            ValueError: the sampler does not suit the model; the message lists those that do.
        """
        self.scheduler = make_scheduler(name, self._own_scheduler)


class SamplingOptions(NamedTuple):
    """Arguments of a pipeline's call that say how to sample, not what the images show."""

    num_inference_steps: int
    guidance_scale: float | None
    """None samples without guidance; otherwise the U-Net sees a batch of 2B, the unconditional half first."""
    generators: list[torch.Generator] | None
    callback: Callable[..., dict] | None
    callback_tensor_inputs: Sequence[str]


class UNetSamplingMixin(SamplersByName):
    """Sampling for a pipeline with a `unet` and its `config.prediction_type`. Name it before DiffusionPipeline.

    The first entry of `_callback_tensor_inputs` is the name of the sampled tensor.
    """

    unet: Any
    config: Any
    image_processor: Any
    progress_bar: Any
    maybe_free_model_hooks: Any
    _callback_tensor_inputs: list[str]
    _output_types: tuple[str, ...] = OUTPUT_TYPES
    _interrupt = False

    def _check_sampling(
        self,
        num_inference_steps: int,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise a ValueError if an argument cannot be used or the scheduler does not suit the model."""
        check_scheduler(self.scheduler, self.config.prediction_type, noise_schedule_of(self._own_scheduler))
        check_positive_integers(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        check_output_type(output_type, self._output_types)
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, but has {unknown}"
            )

    def _given_or_trained_size(self, height: int | None, width: int | None, factor: int = 1) -> tuple[int, int]:
        """Return height and width in pixels; for None, the size that the U-Net was trained at, times `factor`.

        Raises:
            ValueError: a side is None, and the U-Net's config has no size.
        """
        sample_size = self.unet.config.sample_size
        cells = tuple(sample_size) if isinstance(sample_size, (list, tuple)) else (sample_size, sample_size)
        if (height is None or width is None) and None in cells:
            raise ValueError("the U-Net's config has no `sample_size`, so `height` and `width` must be given")
        return cells[0] * factor if height is None else height, cells[1] * factor if width is None else width

    def _sample(
        self,
        noise: Tensor,
        predict: Callable[..., Tensor],
        options: SamplingOptions,
        conditions: Mapping[str, Tensor | None] | None = None,
        prepare: Callable[..., tuple] = tuple,
    ) -> Tensor:
        """Turn standard normal noise into samples (B C h w) in float32; only the U-Net's input has the U-Net's dtype.

        Args:
            predict: (input of the U-Net, timestep, *prepare(**conditions)) → prediction of the U-Net, for B or 2B.
            conditions: tensors that the callback may read and replace, in addition to the samples.
            prepare: function that turns the conditions into arguments of `predict`; it is called at the start, and
                again after a callback has replaced one of them.
        """
        conditions = dict(conditions or {})
        prepared = prepare(**conditions)
        self._interrupt = False

        def guided_prediction(x: Tensor, timestep: Any) -> Tensor:
            model_input = x if options.guidance_scale is None else torch.cat([x, x])
            prediction = predict(model_input.to(self.unet.dtype), timestep, *prepared)
            return guided(prediction.float(), options.guidance_scale)

        def after_step(step: int, timestep: Any, x: Tensor) -> tuple[Tensor, bool]:
            nonlocal prepared
            if options.callback is not None:
                name = self._callback_tensor_inputs[0]
                tensors = {name: x, **conditions}
                chosen = {one: tensors[one] for one in options.callback_tensor_inputs}
                replaced = options.callback(self, step, timestep, chosen) or {}
                x = replaced.get(name, x)
                changed = {one: replaced[one] for one in conditions if one in replaced}
                if changed:
                    conditions.update(changed)
                    prepared = prepare(**conditions)
            return x, self._interrupt

        return denoise(
            self.scheduler, guided_prediction, noise, options.num_inference_steps, options.generators,
            self.progress_bar, after_step,
        )  # fmt: skip

    def _finished(self, images: Any, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Return the result of a call for `images` (B 3 H W in [-1, 1]); output type "latent" leaves them unchanged."""
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
