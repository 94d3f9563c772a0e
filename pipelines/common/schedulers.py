"""Samplers by name: which of them suit a model, and how to build them with the model's prediction type and noise
schedule.

Three things go wrong silently when one Diffusers scheduler is created from the config of another. They are prevented
here:
- DDIM and similar schedulers do not support flow matching; `DDIMScheduler.from_config(flow_config)` becomes a sampler
  for epsilon prediction;
- `from_config` drops numbers that the first scheduler had by default, and defaults differ (Heun starts its betas at
  0.00085, DDPM at 0.0001; DDPM and DDIM clip to [-1, 1], which latents exceed);
- Heun and LMS ignore `rescale_betas_zero_snr`.

PNDM and DEIS are not offered: with a perfect model of a single image, their samples differ from it by 0.1 and more.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EPSILON, SAMPLE, V_PREDICTION, FLOW = "epsilon", "sample", "v_prediction", "flow_prediction"
PREDICTION_TYPES = (EPSILON, V_PREDICTION, SAMPLE, FLOW)


@dataclass(frozen=True)
class Sampler:
    """One sampler: its scheduler class for diffusion models (`diffusion`) and the one for flow matching (`flow`)."""

    diffusion: str
    prediction_types: tuple[str, ...] = (EPSILON, V_PREDICTION, SAMPLE)
    flow: str = ""
    zero_snr: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def suits(self, prediction_type: str, zero_snr: bool) -> bool:
        """Return whether the sampler works with models of this prediction type (and zero terminal SNR)."""
        if prediction_type == FLOW:
            return bool(self.flow)
        return prediction_type in self.prediction_types and (self.zero_snr or not zero_snr)


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler"),
    "ddpm": Sampler("DDPMScheduler"),
    "dpm": Sampler("DPMSolverMultistepScheduler", flow="DPMSolverMultistepScheduler"),
    "dpm_sde": Sampler(
        "DPMSolverMultistepScheduler",
        flow="DPMSolverMultistepScheduler",
        options={"algorithm_type": "sde-dpmsolver++"},
    ),
    "euler": Sampler("EulerDiscreteScheduler", flow="FlowMatchEulerDiscreteScheduler"),
    "euler_ancestral": Sampler("EulerAncestralDiscreteScheduler", (EPSILON, V_PREDICTION)),
    "unipc": Sampler("UniPCMultistepScheduler", flow="UniPCMultistepScheduler"),
    "heun": Sampler("HeunDiscreteScheduler", (EPSILON, V_PREDICTION), "FlowMatchHeunDiscreteScheduler", zero_snr=False),
    "lms": Sampler("LMSDiscreteScheduler", (EPSILON, V_PREDICTION), zero_snr=False),  # needs scipy
}

# These must be equal in training and sampling; otherwise a timestep means another noise level than in training.
NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def training_scheduler(
    prediction_type: str,
    *,
    beta_schedule: str = "scaled_linear",
    rescale_betas_zero_snr: bool = False,
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    shift: float = 1.0,
) -> Any:
    """Return the scheduler for training a model; its pipeline gets the `sampling_scheduler` of this scheduler.

    It is a DDPMScheduler for epsilon, v_prediction and sample, and a FlowMatchEulerDiscreteScheduler for
    flow_prediction, which uses only `num_train_timesteps` and `shift`. Sampling includes the last timestep ("trailing":
    Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", section 3.3) and does not clip,
    because latents are unbounded.

    Raises:
        ValueError: the prediction type is unknown, or zero terminal SNR is combined with epsilon, from which nothing
            can be learned about an image that is all noise (Lin et al., section 3.1), or with flow matching, which has
            it by construction.
    """
    import diffusers

    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, but is '{prediction_type}'")
    if rescale_betas_zero_snr and prediction_type in (EPSILON, FLOW):
        raise ValueError(
            f"`rescale_betas_zero_snr` cannot be used with `prediction_type` '{prediction_type}'; "
            f"use {V_PREDICTION} or {SAMPLE}"
        )
    if prediction_type == FLOW:
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps, shift=shift)
    return diffusers.DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def sampling_scheduler(scheduler: Any) -> Any:
    """Return the sampler of a trained pipeline: Euler for flow matching, DPM-Solver++ otherwise.

    The DDPM scheduler of `training_scheduler` would need hundreds of steps.
    """
    return make_scheduler("euler" if prediction_type_of(scheduler) == FLOW else "dpm", scheduler)


def prediction_type_of(scheduler: Any) -> str:
    """Return the prediction type that `scheduler` expects; the config of flow-match classes does not contain it."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return FLOW
    return str(scheduler.config.get("prediction_type", EPSILON))


def noise_schedule_of(scheduler: Any) -> Tensor | None:
    """Return the cumulative alphas (one per training timestep), or None for flow matching, which has one schedule."""
    if prediction_type_of(scheduler) == FLOW:
        return None
    return getattr(scheduler, "alphas_cumprod", None)


def suitable_samplers(prediction_type: str, zero_snr: bool = False) -> list[str]:
    """Return the names for `make_scheduler` that suit a model of this prediction type (and zero terminal SNR)."""
    return [name for name, sampler in SAMPLERS.items() if sampler.suits(prediction_type, zero_snr)]


def make_scheduler(name: str, scheduler: Any) -> Any:
    """Build the sampler `name` (a key of SAMPLERS, `flow_euler` or `flow_heun`) for the model of `scheduler`.

    Args:
        scheduler: the pipeline's own scheduler, whose noise schedule and prediction type the sampler gets.

    Raises:
        ValueError: the name is unknown, or the sampler does not suit the model.
    """
    import diffusers

    prediction_type, zero_snr = prediction_type_of(scheduler), bool(scheduler.config.get("rescale_betas_zero_snr"))
    suitable = ", ".join(suitable_samplers(prediction_type, zero_snr))
    plain_name = name.removeprefix("flow_") if prediction_type == FLOW else name
    if plain_name not in SAMPLERS:
        raise ValueError(f"unknown scheduler '{name}'; for this model ({prediction_type}), use one of {suitable}")
    sampler = SAMPLERS[plain_name]
    if not sampler.suits(prediction_type, zero_snr):
        model = f"{prediction_type} with zero terminal SNR" if zero_snr else prediction_type
        raise ValueError(f"scheduler '{name}' does not suit this model, which predicts {model}; use one of {suitable}")
    if name == "lms" and not diffusers.utils.is_scipy_available():
        raise ValueError(
            "scheduler 'lms' needs scipy, which is not installed; run `pip install scipy`, or use another scheduler"
        )
    if prediction_type == FLOW:
        return _flow_scheduler(getattr(diffusers, sampler.flow), scheduler.config, sampler.options)
    return _diffusion_scheduler(getattr(diffusers, sampler.diffusion), scheduler.config, sampler.options)


def check_scheduler(scheduler: Any, prediction_type: str, noise_schedule: Tensor | None = None) -> None:
    """Raise ValueError if `scheduler` does not suit a model of `prediction_type` with its training's noise schedule.

    Args:
        noise_schedule: cumulative alphas of the training (`noise_schedule_of` its scheduler); None skips this check.

    Raises:
        ValueError: the scheduler does not suit the model; the message says what differs, and which samplers suit.
    """
    class_name = type(scheduler).__name__
    # With zero terminal SNR the last alpha is 0; samplers that would divide by it have 2**-24 instead.
    zero_snr = noise_schedule is not None and float(noise_schedule[-1]) in (0.0, 2**-24)
    advice = (
        f"use one of {', '.join(suitable_samplers(prediction_type, zero_snr))}: "
        "`pipeline.set_scheduler(name)` builds it with the model's noise schedule"
    )
    expected = prediction_type_of(scheduler)
    if expected != prediction_type:
        raise ValueError(f"the model predicts {prediction_type}, but {class_name} expects {expected}; {advice}")
    known = [s for s in SAMPLERS.values() if class_name in (s.diffusion, s.flow)]
    if known and not any(
        s.suits(prediction_type, zero_snr) and class_name == (s.flow if expected == FLOW else s.diffusion)
        for s in known
    ):
        raise ValueError(f"{class_name} does not suit this model, which predicts {prediction_type}; {advice}")
    if expected == FLOW and scheduler.config.get("use_flow_sigmas") is False:
        raise ValueError(
            f"{class_name} has `use_flow_sigmas` False, but the model predicts {prediction_type}; {advice}"
        )
    if scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"):
        raise ValueError(f"{class_name} clips predictions to the range of pixels, but latents are unbounded; {advice}")
    alphas = noise_schedule_of(scheduler)
    if noise_schedule is not None and alphas is not None and not _same_schedule(alphas, noise_schedule):
        raise ValueError(f"{class_name} has another noise schedule than the model had in training; {advice}")


def _same_schedule(a: Tensor, b: Tensor) -> bool:
    # The tolerance accepts 2**-24 in the place of the 0 of a zero terminal SNR.
    return a.shape == b.shape and torch.allclose(a.float().cpu(), b.float().cpu(), rtol=1e-3, atol=1e-6)


def _flow_scheduler(scheduler_class: Any, config: Any, options: dict[str, Any]) -> Any:
    steps = config.get("num_train_timesteps", 1000)
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if scheduler_class.__name__.startswith("FlowMatch"):
        if "shift_terminal" in scheduler_class._get_init_keys(scheduler_class):  # the last level of a distilled model
            options = {"shift_terminal": config.get("shift_terminal"), **options}
        return scheduler_class(num_train_timesteps=steps, shift=shift, **options)
    flow = {"prediction_type": FLOW, "use_flow_sigmas": True, "flow_shift": shift}
    return scheduler_class(num_train_timesteps=steps, **flow, **options)


def _diffusion_scheduler(scheduler_class: Any, config: Any, options: dict[str, Any]) -> Any:
    carried = (*NOISE_SCHEDULE, "prediction_type", "timestep_spacing", "steps_offset", "rescale_betas_zero_snr")
    known = scheduler_class._get_init_keys(scheduler_class)
    numbers = {name: config[name] for name in carried if name in known and config.get(name) is not None}
    if "clip_sample" in known:
        numbers["clip_sample"] = False
    return scheduler_class(**numbers, **options)
