"""Shared by the pipelines that generate from noise: samplers by name, and sampling with a guided U-Net and a callback
after each step.

Shapes: B images, C channels, h w latent cells or pixels.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .checks import (
    OUTPUT_TYPES,
    check_generator,
    check_numbers,
    check_output_type,
    check_positive_integers,
    check_tensor,
)
from .guidance import WHOLE_INTERVAL, check_guidance_interval, guided_timesteps
from .latents import image_channels_of
from .pixels import straight
from .sampling import denoise, guided, restarted
from .schedulers import PREDICTION_TYPES, check_scheduler, make_scheduler, noise_schedule_of, prediction_type_of
from .starting_image import StartingImage, starting_image


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

    steps: Mapping[str, Any]
    """Arguments of the scheduler's `set_timesteps`, see `check_steps`."""
    generators: list[torch.Generator] | None
    callback: Callable[..., dict] | None
    callback_tensor_inputs: Sequence[str]
    guidance_interval: Sequence[float] = WHOLE_INTERVAL
    """Noise levels with guidance, see `guided_timesteps`."""
    start: StartingImage | None = None
    """Images to start from; None for pure noise."""


class Conditions:
    """The tensors that a callback may read and replace: one row for each image, or two with guidance.

    With guidance the unconditional half comes first, so the last B rows are always the conditional ones.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None], num_images: int):
        self.tensors = dict(tensors)
        self.num_images = num_images

    def replace(self, replaced: Mapping[str, Any]) -> bool:
        """Take the tensors that a callback returned, and return whether one of them is new.

        A single row stands for all images. `SDCFGCutoffCallback` returns the last row, and means the conditional half.

        Raises:
            ValueError: a tensor has the wrong shape.
        """
        changed = False
        for name, before in self.tensors.items():
            value = replaced.get(name, before)
            if value is before or before is None:
                continue
            rows = len(value) if isinstance(value, Tensor) and value.ndim else 0
            value = value.to(before) if rows else value
            if rows == 1 and torch.equal(value, before[-1:]):
                value = before[-self.num_images :]
            elif rows == 1:
                value = value.expand(self.num_images, *value.shape[1:])
            elif rows not in (self.num_images, 2 * self.num_images):
                raise ValueError(
                    f"`callback_on_step_end` returned `{name}` with {rows} rows, but there are {self.num_images} images"
                )
            check_tensor(name, value, (len(value), *before.shape[1:]))
            self.tensors[name], changed = value, True
        return changed

    def rows(self, count: int) -> dict[str, Tensor | None]:
        """Return the last `count` rows of each tensor.

        Raises:
            ValueError: there are fewer rows, because a callback returned fewer and switched guidance on.
        """
        for name, tensor in self.tensors.items():
            if tensor is not None and len(tensor) < count:
                raise ValueError(
                    f"guidance needs `{name}` with {count} rows, the unconditional half first, but there are "
                    f"{len(tensor)}; return them from `callback_on_step_end`"
                )
        return {name: None if tensor is None else tensor[-count:] for name, tensor in self.tensors.items()}


class UNetSamplingMixin(SamplersByName):
    """Sampling for a pipeline with a `unet` and its `config.prediction_type`. Name it before DiffusionPipeline.

    The first entry of `_callback_tensor_inputs` is the name of the sampled tensor. As in the pipelines of Diffusers, a
    callback may set `_guidance_scale` and `_interrupt`.
    """

    unet: Any
    config: Any
    image_processor: Any
    progress_bar: Any
    maybe_free_model_hooks: Any
    _callback_tensor_inputs: list[str]
    _output_types: tuple[str, ...] = OUTPUT_TYPES
    _interrupt = False
    _guidance_scale = 1.0
    _conditioned = False
    _autoguided = False
    _num_timesteps = 0
    _size: Any

    @property
    def denoiser(self) -> Any:
        """The network that denoises."""
        return self.unet

    @property
    def guidance_scale(self) -> float:
        """Scale of guidance (classifier-free, or by a guidance model) in the current call; a callback may change
        `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional prediction guides the current call: the scale is above 1, there is a condition,
        and no other model guides."""
        return self._guidance_scale > 1 and self._conditioned and not self._autoguided

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the current call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether sampling ends after the current step; a callback may set `_interrupt`."""
        return self._interrupt

    def _check_sampling(
        self,
        num_images_per_prompt: Any,
        guidance_scale: Any,
        generator: Any,
        output_type: Any,
        callback: Any,
        callback_tensor_inputs: Any,
        guidance_interval: Any = WHOLE_INTERVAL,
    ) -> None:
        """Raise a ValueError if an argument cannot be used or the scheduler does not suit the model."""
        check_scheduler(self.scheduler, self.config.prediction_type, noise_schedule_of(self._own_scheduler))
        check_guidance_interval(guidance_interval, self._own_scheduler, self.config.prediction_type)
        check_positive_integers(num_images_per_prompt=num_images_per_prompt)
        check_numbers(guidance_scale=guidance_scale)
        check_generator(generator)
        check_output_type(output_type, self._output_types)
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback_on_step_end` must be a function, but is {callback!r}")
        known, names = self._callback_tensor_inputs, callback_tensor_inputs
        if not isinstance(names, (list, tuple)):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` must be a list of {known}, but is {names!r}")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {known}, but has {unknown}")
        for one in getattr(callback, "callbacks", [callback]):
            if "IPAdapter" in type(one).__name__:
                raise ValueError(f"`callback_on_step_end` is a {type(one).__name__}, but this model has none")

    def _given_or_trained_size(self, height: Any, width: Any, factor: int = 1) -> tuple[int, int]:
        """Return height and width in pixels; for None, the size that the model was trained at, times `factor`.

        Raises:
            ValueError: a side is not a positive integer, or it is None, and the model's config has no size.
        """
        given = {"height": height, "width": width}
        check_positive_integers(**{name: side for name, side in given.items() if side is not None})
        sample_size = self.denoiser.config.sample_size
        cells = tuple(sample_size) if isinstance(sample_size, (list, tuple)) else (sample_size, sample_size)
        if (height is None or width is None) and None in cells:
            raise ValueError("the model's config has no `sample_size`, so `height` and `width` must be given")
        return int(cells[0] * factor if height is None else height), int(cells[1] * factor if width is None else width)

    def _starting_image(
        self, image: Any, mask_image: Any, strength: Any, jump_n_sample: Any, paste_back: Any, height: Any, width: Any,
        repeats: int, output_type: str,
    ) -> StartingImage | None:  # fmt: skip
        """Return the checked images to start from, in the size to generate; None if none is given, see there."""
        vae = getattr(self, "vae", None)
        channels = int(self.denoiser.config.out_channels) if vae is None else image_channels_of(vae)
        return starting_image(
            image, mask_image, strength, jump_n_sample, paste_back, channels=channels,
            size=self._size(height, width), repeats=repeats, output_type=output_type,
        )  # fmt: skip

    def _begin(self, guidance_scale: Any, conditioned: bool, autoguided: bool = False) -> None:
        """Reset what a callback may read and change."""
        self._guidance_scale, self._interrupt = float(guidance_scale), False
        self._conditioned, self._autoguided = conditioned, autoguided

    def _sample(
        self,
        noise: Tensor,
        predict: Callable[..., Tensor],
        options: SamplingOptions,
        tensors: Mapping[str, Tensor | None],
        prepare: Callable[..., tuple],
        weaker: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Turn standard normal noise into samples (B C h w) in float32; only the network's input has its dtype.

        Args:
            predict: (input of the network, timestep, *prepare(**tensors)) → its prediction, for B or 2B.
            tensors: those that the callback may read and replace, in addition to the samples, see `Conditions`.
            prepare: function that turns the tensors into arguments of `predict`; it is called at the start, and again
                after a callback has replaced one of them or has switched guidance off or on.
            weaker: the prediction of a guidance model, with the arguments of `predict`, for B; see `guidance`.
        """
        conditions = Conditions(tensors, len(noise))
        prepared: dict[int, tuple] = {}  # by the number of rows
        guided_at_start = self.do_classifier_free_guidance
        start = options.start and options.start.point(getattr(self, "vae", None), noise, self.config.prediction_type)
        in_interval = guided_timesteps(self._own_scheduler, self.config.prediction_type, options.guidance_interval)

        def guided_prediction(x: Tensor, timestep: Any, may_guide: bool = True) -> Tensor:
            if self.do_classifier_free_guidance and not guided_at_start:
                raise ValueError(
                    f"`callback_on_step_end` set the guidance scale to {self._guidance_scale}, but sampling began "
                    "without guidance; call the pipeline with a `guidance_scale` above 1"
                )
            guides = may_guide and self._guidance_scale > 1 and in_interval(timestep)
            scale = self._guidance_scale if guides and self.do_classifier_free_guidance else None
            model_input = x if scale is None else torch.cat([x, x])
            rows = len(model_input)
            if rows not in prepared:
                prepared[rows] = prepare(**conditions.rows(rows))
            prediction = predict(model_input.to(self.denoiser.dtype), timestep, *prepared[rows]).float()
            if weaker is not None and guides:
                prediction = torch.cat([weaker(x, timestep, *prepared[rows]).float(), prediction])
                scale = self._guidance_scale
            return guided(prediction, scale)

        def after_step(step: int, timestep: Any, x: Tensor) -> tuple[Tensor, bool]:
            self._num_timesteps = len(self.scheduler.timesteps) - (start.first if start else 0)
            x, replaced = self._called_back(options, conditions, step, timestep, x)
            if replaced:
                prepared.clear()
            return x, self._interrupt

        config = self.denoiser.config
        x = denoise(
            self.scheduler, guided_prediction, noise, options.steps, options.generators, self.progress_bar, after_step,
            float(config.get("least_noise_level") or 0.0), start,
        )  # fmt: skip
        levels = () if self._interrupt else config.get("restart_levels") or ()
        trained = self._own_scheduler.config.num_train_timesteps
        predict_plainly = partial(guided_prediction, may_guide=False)
        return restarted(x, levels, predict_plainly, trained, options.generators, start)

    def _called_back(
        self, options: SamplingOptions, conditions: Conditions, step: int, timestep: Any, x: Tensor
    ) -> tuple[Tensor, bool]:
        """Call the callback after a step; return the samples, and whether it has replaced a condition."""
        if options.callback is None:
            return x, False
        name = self._callback_tensor_inputs[0]
        chosen = {one: {name: x, **conditions.tensors}[one] for one in options.callback_tensor_inputs}
        replaced = options.callback(self, step, timestep, chosen)
        if replaced is not None and not isinstance(replaced, Mapping):
            raise ValueError(f"`callback_on_step_end` must return a dictionary, but returned {replaced!r}")
        replaced = replaced or {}
        check_tensor(name, replaced.get(name, x), x.shape)
        return replaced.get(name, x), conditions.replace(replaced)

    def _finished(
        self, images: Any, output_type: str, return_dict: bool, start: StartingImage | None = None
    ) -> ImagePipelineOutput | tuple:
        """Return the result of a call for `images` (B C H W in [-1, 1]); output type "latent" leaves them unchanged."""
        if output_type != "latent":
            images = straight(images)
            images = images if start is None else start.pasted(images)
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def is_stock(callback: Any) -> bool:
    """Whether `callback` is one of Diffusers, which names the tensors that it needs."""
    return isinstance(callback, (PipelineCallback, MultiPipelineCallbacks))


def tensor_inputs_of(callback: Any, tensor_inputs: Any) -> Any:
    """Return the tensors that a callback of Diffusers needs, or `tensor_inputs` for any other callback."""
    if is_stock(callback):
        return list(callback.tensor_inputs)
    return [] if tensor_inputs is None else tensor_inputs
