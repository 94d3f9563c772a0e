"""The configured diffusion objective: flags, noise levels and the loss of a batch, for all stages that denoise.

x_0: B C h w, clean latents or pixels; timesteps: B, as they are passed to the U-Net.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
NOISE_BANDS = ("0_25", "25_50", "50_75", "75_100")  # in percent of the timesteps; the last has the most noise
_TIME = "time"
RARE = 3.0
"""A normal variable lies this many standard deviations below its mean with a probability of 0.1 %."""


@dataclass
class NoiseScheduleConfig(Options):
    """Flags that are fixed for a model; a model that is built on it uses the same values."""

    prediction_type: str = option("flow_prediction", choices=functional.PREDICTION_TYPES)
    """What the model predicts: epsilon, v_prediction, sample, or flow_prediction (rectified flow)"""
    num_train_timesteps: int = option(1000, at_least=2)
    """Number of timesteps (noise levels) of the noise schedule"""
    beta_schedule: str = option("scaled_linear", choices=BETA_SCHEDULES)
    """Noise schedule: linear, scaled_linear or squaredcos_cap_v2; not used with flow_prediction"""
    beta_start: float = option(0.00085)
    """First beta of the noise schedule; not used with flow_prediction"""
    beta_end: float = option(0.012)
    """Last beta of the noise schedule; not used with flow_prediction"""
    rescale_betas_zero_snr: bool = option(False)
    """Rescale the betas to zero terminal SNR (Lin et al. 2024); only for v_prediction and sample"""
    flow_shift: float = option(1.0, above=0, usual="1")
    """Timestep shift for flow_prediction, in training and sampling; 1 disables it, larger values favour noisier
    timesteps (e.g. 3 for latents much larger than 32x32)"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.rescale_betas_zero_snr and self.prediction_type not in ("v_prediction", "sample"):
            raise UserError(
                f"--rescale_betas_zero_snr cannot be used with --prediction_type {self.prediction_type}; "
                "use v_prediction or sample"
            )


@dataclass
class ObjectiveConfig(Options):
    """Flags of the training objective."""

    timestep_sampling: str = option("logit_normal", on_resume="warn", choices=TIMESTEP_SAMPLINGS)
    """Distribution of the timesteps in training: uniform or logit_normal"""
    logit_mean: float = option(0.0, on_resume="warn")
    """Mean of the logit-normal timestep distribution (only with --timestep_sampling logit_normal)"""
    logit_std: float = option(1.0, on_resume="warn")
    """Standard deviation of the logit-normal timestep distribution (only with --timestep_sampling logit_normal)"""
    snr_gamma: float | None = option(None, on_resume="warn", above=0, usual="5")
    """Gamma of the min-SNR loss weighting (Hang et al. 2023), 5 in the paper; if unset, the loss is not weighted"""
    noise_offset: float = option(0.0, on_resume="warn", at_least=0)
    """Strength of offset noise; 0 disables it"""
    noise_candidates: int = option(1, on_resume="warn", at_least=1)
    """Number of independent draws of noise per sample in training, of which the nearest to the clean sample is used
    (immiscible diffusion, Li et al. 2024 and 2025); 1 disables the choice. Validation always has a single draw"""
    cfg_dropout: float = option(0.1, on_resume="warn", at_least=0, at_most=1, usual="0.1")
    """Probability of training a sample without its caption, label or design brief, for classifier-free guidance"""


@dataclass
class DiffusionConfig(ObjectiveConfig, NoiseScheduleConfig):
    """All flags of the objective."""

    @property
    def least_noise_level(self) -> float:
        """Noise level (0 to 1) below which a training with flow matching has one sample in a thousand; else 0."""
        if self.prediction_type != "flow_prediction" or self.timestep_sampling != "logit_normal":
            return 0.0
        time = torch.sigmoid(torch.tensor(self.logit_mean - RARE * self.logit_std, dtype=torch.float64))
        return round(float(functional.shift_times(time, self.flow_shift)), 4)


@dataclass
class NoisyBatch:
    """Input and target of the model for a batch. x_t, target: B C h w; timesteps, weight: B."""

    x_t: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor

    def loss(self, prediction: Tensor) -> Tensor:
        """Compute the weighted mean squared error of each sample. B."""
        return self.weight * functional.mse_per_sample(prediction, self.target)


def noise_schedule_of_pipeline(pipeline: Any) -> NoiseScheduleConfig:
    """Return the noise schedule that the model of `pipeline` was trained with."""
    scheduler = pipeline.scheduler.config
    settings = {
        name: scheduler[name]
        for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
        if scheduler.get(name) is not None
    }
    return NoiseScheduleConfig(
        prediction_type=pipeline.config.prediction_type,
        rescale_betas_zero_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        flow_shift=scheduler.get("shift") or scheduler.get("flow_shift") or 1.0,
        **settings,
    )


def diffusion_of_pipeline(pipeline: Any, config: ObjectiveConfig) -> Diffusion:
    """Return the objective in `config` on the noise schedule of a trained model.

    The model knows only the noise schedule and prediction type that it was trained with.
    """
    flags = {f.name: getattr(config, f.name) for f in dataclasses.fields(ObjectiveConfig)}
    return Diffusion(DiffusionConfig(**dataclasses.asdict(noise_schedule_of_pipeline(pipeline)), **flags))


class Diffusion:
    """Adds noise to batches, and holds the scheduler that pipelines sample with."""

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
        """Add noise at random timesteps.

        Args:
            sampling: a distribution of the timesteps instead of the configured one, for validation, which is uniform.
                The noise is then the first draw of each sample, so that losses of validation do not depend on the
                number of candidates.
        """
        config = self.config
        noise = self._noise(x_0, draws, config.noise_candidates if sampling is None else 1)
        times = functional.unit_times(
            draws.uniform(_TIME),
            draws.normal(_TIME, ()),
            sampling or config.timestep_sampling,
            config.logit_mean,
            config.logit_std,
        )
        alpha, sigma, timesteps = self.noise_levels(times)
        weight = torch.ones_like(sigma)
        if config.snr_gamma:
            weight = functional.min_snr_weight(config.prediction_type, alpha, sigma, config.snr_gamma)
        return NoisyBatch(
            functional.corrupt(x_0, noise, alpha, sigma),
            timesteps,
            functional.prediction_target(config.prediction_type, x_0, noise, alpha, sigma),
            weight,
        )

    def _noise(self, x_0: Tensor, draws: Draws, candidates: int) -> Tensor:
        """Return noise with its offset: of a number of candidates for each sample, the nearest to it. B C h w."""
        shape, strength = x_0.shape[1:], self.config.noise_offset
        # The first candidate has a name of its own, so that it is the noise of a run without a choice.
        noise = draws.normal("noise", shape).to(x_0.dtype)
        offset = None
        if strength:
            offset = draws.normal("noise_offset", (shape[0], *[1] * (len(shape) - 1))).to(x_0.dtype)
            noise = functional.offset_noise(noise, offset, strength)
        if candidates == 1:
            return noise
        others = draws.normal("noise_candidates", (candidates - 1, *shape)).to(x_0.dtype)
        if offset is not None:
            others = functional.offset_noise(others, offset.unsqueeze(1), strength)
        return functional.nearest_noise(x_0, torch.cat([noise.unsqueeze(1), others], 1))

    def noise_levels(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha, sigma and the timesteps for the U-Net, from times in [0, 1]. Each has the shape of `times`."""
        total = self.config.num_train_timesteps
        if self._alphas_cumprod is None:
            sigma = functional.shift_times(times, self.config.flow_shift)
            return 1 - sigma, sigma, sigma * total
        timesteps = (times * total).long().clamp(max=total - 1)
        self._alphas_cumprod = self._alphas_cumprod.to(times.device)  # kept there: a copy per step would wait for it
        signal = self._alphas_cumprod[timesteps]
        return signal.sqrt(), (1 - signal).sqrt(), timesteps


def noise_level_sums(losses: Tensor, draws: Draws) -> dict[str, Tensor]:
    """Return the sums and counts of losses in four bands of the noise level, for `noise_level_metrics`.

    Args:
        losses: B, of samples that `Diffusion.corrupt` has given noise with these `draws` and `sampling="uniform"`.
    """
    band = (draws.uniform(_TIME) * len(NOISE_BANDS)).long().clamp(max=len(NOISE_BANDS) - 1)
    sums = {}
    for number, name in enumerate(NOISE_BANDS):
        sums[f"loss_noise_{name}"] = losses[band == number].sum()
        sums[f"count_noise_{name}"] = (band == number).sum()
    return sums


def noise_level_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the mean loss in each band of the noise level; a band without samples is left out."""
    means = {}
    for name in NOISE_BANDS:
        if count := sums.get(f"count_noise_{name}"):
            means[f"val_loss_noise_{name}"] = sums[f"loss_noise_{name}"] / count
    return means
