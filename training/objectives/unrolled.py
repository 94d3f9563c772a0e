"""Sampling as a differentiable function: posters from noise, with a gradient through the last steps only.

This is DRaFT-K of Clark et al. 2023 (arXiv 2309.17400): the steps before the last K run without a gradient, so that the
memory is that of K steps. The sampler is DDIM without noise (Song et al. 2021, eq. 12), which for rectified flow is
Euler's method.

Shapes: B samples, C channels, h w cells or pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.objectives.diffusion import Diffusion


class NoiseLevel(NamedTuple):
    """x_t = alpha x_0 + sigma noise at a timestep."""

    alpha: float
    sigma: float
    timestep: float


def noise_levels(diffusion: Diffusion, steps: int) -> list[NoiseLevel]:
    """Return the noise levels of a sampler of some steps, from pure noise on, evenly spaced in time.

    The last one is 1/steps of the time, so that the last step still decides something: a sampler whose last noise level
    is near 0 copies its input there, and a gradient through this step alone would vanish.
    """
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    alphas, sigmas, timesteps = diffusion.noise_levels(times)
    columns = (alphas.tolist(), sigmas.tolist(), timesteps.tolist())
    return [NoiseLevel(*row) for row in zip(*columns, strict=True)]


def clean_and_noise(
    prediction_type: str, x_t: Tensor, prediction: Tensor, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    """Return the clean sample x_0 and the noise that a prediction implies; the inverse of `prediction_target`."""
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / alpha, prediction
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction
    if prediction_type == "sample":
        return prediction, (x_t - alpha * prediction) / sigma
    if prediction_type == "flow_prediction":
        return x_t - sigma * prediction, x_t + alpha * prediction
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def unrolled(
    predict: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    levels: Sequence[NoiseLevel],
    prediction_type: str,
    gradient_steps: int,
) -> Tensor:
    """Return samples x_0 (B C h w) with a gradient through the last `gradient_steps` predictions.

    Args:
        predict: (x_t, timestep) → the prediction of the model, with guidance applied.
        noise: standard normal, B C h w.
    """
    x_t, first = noise, max(0, len(levels) - gradient_steps)
    following = [*((level.alpha, level.sigma) for level in levels[1:]), (1.0, 0.0)]
    for number, (level, (alpha, sigma)) in enumerate(zip(levels, following, strict=True)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and number >= first):
            prediction = predict(x_t, level.timestep).float()
            clean, implied = clean_and_noise(prediction_type, x_t, prediction, level.alpha, level.sigma)
            x_t = alpha * clean + sigma * implied
    return x_t
