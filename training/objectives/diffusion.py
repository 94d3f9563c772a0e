"""The diffusion objective as configured: flags, noise levels, and the loss of one batch, for all stages that denoise.

x_0: B C h w, clean latents or pixels; timesteps: B, as the U-Net is told them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.tools.cli import UserError
from training.core.draws import Draws
from training.core.options import Options, option
from training.objectives import functional

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")


@dataclass
class NoiseScheduleConfig(Options):
    """Flags that make a model what it is: one that is built on it takes them over."""

    prediction_type: str = option("flow_prediction", choices=functional.PREDICTION_TYPES)
    """epsilon, v_prediction, sample, or flow_prediction (rectified flow)"""
    num_train_timesteps: int = option(1000, at_least=2)
    """Noise levels of the schedule"""
    beta_schedule: str = option("scaled_linear", choices=BETA_SCHEDULES)
    """linear, scaled_linear or squaredcos_cap_v2; flow matching has none"""
    beta_start: float = option(0.00085)
    """First beta"""
    beta_end: float = option(0.012)
    """Last beta"""
    rescale_betas_zero_snr: bool = option(False)
    """Zero terminal SNR (Lin et al. 2024); for v_prediction and sample"""
    flow_shift: float = option(1.0, above=0, usual="1")
    """Shift of the flow's times towards noise, in training and sampling; above 1 for large latents"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.rescale_betas_zero_snr and self.prediction_type not in ("v_prediction", "sample"):
            raise UserError(
                f"--rescale_betas_zero_snr does not go with --prediction_type {self.prediction_type}; "
                "use v_prediction or sample"
            )


@dataclass
class ObjectiveConfig(Options):
    """Flags of how it is trained."""

    timestep_sampling: str = option("logit_normal", on_resume="warn", choices=TIMESTEP_SAMPLINGS)
    """uniform or logit_normal"""
    logit_mean: float = option(0.0, on_resume="warn")
    """Of logit_normal"""
    logit_std: float = option(1.0, on_resume="warn")
    """Of logit_normal"""
    snr_gamma: float | None = option(None, on_resume="warn", above=0, usual="5")
    """Min-SNR weighting (Hang et al. 2023); 5 is the paper's"""
    noise_offset: float = option(0.0, on_resume="warn", at_least=0)
    """Strength of offset noise"""
    cfg_dropout: float = option(0.1, on_resume="warn", at_least=0, at_most=1, usual="0.1")
    """Share of samples trained without their condition, for classifier-free guidance"""


@dataclass
class DiffusionConfig(ObjectiveConfig, NoiseScheduleConfig):
    """All flags of the objective."""


@dataclass
class NoisyBatch:
    """What the model sees, and what it should answer. x_t, target: B C h w; timesteps, weight: B."""

    x_t: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor

    def loss(self, prediction: Tensor) -> Tensor:
        """Weighted mean squared error per sample. B."""
        return self.weight * functional.mse_per_sample(prediction, self.target)


def noise_schedule_of_pipeline(pipeline: Any) -> NoiseScheduleConfig:
    """The schedule that the model of `pipeline` was trained with."""
    scheduler = pipeline.scheduler.config
    found = {
        name: scheduler[name]
        for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
        if scheduler.get(name) is not None
    }
    return NoiseScheduleConfig(
        prediction_type=pipeline.config.prediction_type,
        rescale_betas_zero_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        flow_shift=scheduler.get("shift") or scheduler.get("flow_shift") or 1.0,
        **found,
    )


class Diffusion:
    """Corrupts batches, and carries the scheduler that pipelines sample with."""

    def __init__(self, config: DiffusionConfig):
        from pipelines.common.schedulers import noise_schedule_of, training_scheduler

        self.config = config
        self.scheduler: Any = training_scheduler(
            config.prediction_type,
            beta_schedule=config.beta_schedule,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            shift=config.flow_shift,
        )
        self._alphas_cumprod = noise_schedule_of(self.scheduler)
        self.trivial_loss = None if config.snr_gamma else functional.trivial_mse(config.prediction_type)

    def corrupt(self, x_0: Tensor, draws: Draws, *, sampling: str | None = None) -> NoisyBatch:
        """Noise at random times; `sampling` overrides the configured one (validation is always uniform)."""
        config = self.config
        noise = draws.normal("noise", x_0.shape[1:]).to(x_0.dtype)
        if config.noise_offset:
            offset = draws.normal("noise_offset", (x_0.shape[1], *[1] * (x_0.ndim - 2))).to(x_0.dtype)
            noise = functional.offset_noise(noise, offset, config.noise_offset)
        times = functional.unit_times(
            draws.uniform("time"),
            draws.normal("time", ()),
            sampling or config.timestep_sampling,
            config.logit_mean,
            config.logit_std,
        )
        alpha, sigma, timesteps = self._noise_levels(times)
        weight = torch.ones_like(sigma)
        if config.snr_gamma:
            weight = functional.min_snr_weight(config.prediction_type, alpha, sigma, config.snr_gamma)
        return NoisyBatch(
            functional.corrupt(x_0, noise, alpha, sigma),
            timesteps,
            functional.prediction_target(config.prediction_type, x_0, noise, alpha, sigma),
            weight,
        )

    def _noise_levels(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and what the U-Net is told, from times in [0, 1)."""
        total = self.config.num_train_timesteps
        if self._alphas_cumprod is None:
            sigma = functional.shift_times(times, self.config.flow_shift)
            return 1 - sigma, sigma, sigma * total
        timesteps = (times * total).long().clamp(max=total - 1)
        signal = self._alphas_cumprod.to(times.device)[timesteps]
        return signal.sqrt(), (1 - signal).sqrt(), timesteps
