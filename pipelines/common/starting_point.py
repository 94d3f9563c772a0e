"""Sampling that starts from a clean sample instead of pure noise, and that may keep a part of it.

An image to image call (SDEdit: Meng et al. 2022, arXiv 2108.01073) adds noise to the sample up to the noise level of a
step, and takes the steps from there. Inpainting with a model that was not trained for it (Blended diffusion: Avrahami
et al. 2022, arXiv 2111.14818) replaces the known part after each step by the sample with the noise of that step's end.
Resampling (RePaint: Lugmayr et al. 2022, arXiv 2201.09865) takes each step several times: noise is added again to the
end of a step, so that the filled part can adapt to the known one.

Schedulers scale x_t differently, so here x_t = alpha x_0 + sigma noise with the two numbers of the scheduler itself.

Shapes: B images, C channels, h w latent cells or pixels, N steps.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .schedulers import EPSILON, FLOW, SAMPLE

ROUNDING = 1e-6  # 100 steps of strength 0.29 are 28.999999999999996 in floating-point numbers


@dataclass
class StartingPoint:
    """A clean sample from which sampling starts, and the part of it that is kept.

    `begin` is called before the first step, and the other methods with the number of a step of the whole schedule.
    """

    x_0: Tensor
    """B C h w"""
    noise: Tensor
    """B C h w, standard normal: the noise of the start, and that of the part that is kept."""
    strength: float
    """Share of the steps that are taken, in [0, 1]."""
    prediction_type: str
    keep: Tensor | None = None
    """B 1 h w, True where the clean sample is kept; None keeps nothing."""
    jump_n_sample: int = 1
    """How many times each step is taken; above 1, the steps are resampled."""
    first: int = field(default=0, init=False)
    """The number of the first step, known after `begin`."""
    levels: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)
    """alpha and sigma before each step and after the last one."""

    def begin(self, scheduler: Any, count: int) -> Tensor:
        """Return the sample before the first step (B C h w), and prepare `scheduler` for that step.

        With strength 1 it is pure noise, as without a starting point. With a strength of no step, it is the clean
        sample, and `first` is `count`.

        Args:
            scheduler: its timesteps are set.
            count: the number of timesteps that are used; the last ones may be left out (`denoise`).
        """
        self.levels = _levels(scheduler, self.prediction_type)[:count]
        self.levels.append((torch.ones_like(self.levels[0][0]), torch.zeros_like(self.levels[0][0])))
        order = int(getattr(scheduler, "order", 1))  # a scheduler of order 2 has two timesteps for each step
        steps = (len(scheduler.timesteps) + order - 1) // order
        taken = min(int(steps * self.strength + ROUNDING), steps)
        if taken == 0:
            self.first = count
            return self.x_0
        # If all of the steps to take are below the least noise level of the network, the last one above it is taken.
        self.first = min((steps - taken) * order, count - 1)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.first)
        if self.first == 0:
            return self.noise * getattr(scheduler, "init_noise_sigma", 1.0)
        return self._noisy(self.first)

    @property
    def noise_level(self) -> float:
        """The noise level from which sampling started, from 0 (a clean sample) to 1 (pure noise)."""
        alpha, sigma = self.levels[self.first]
        return float(sigma / (alpha + sigma))

    @property
    def last(self) -> int:
        """The number of the last step."""
        return len(self.levels) - 2

    @property
    def resamples(self) -> bool:
        """Whether steps are taken more than once."""
        return self.keep is not None and self.jump_n_sample > 1

    def resampled(
        self,
        scheduler: Any,
        step: int,
        x: Tensor,
        predict: Callable[[Tensor], tuple[Tensor, Tensor]],
        draw: Callable[[], Tensor],
    ) -> Tensor:
        """Return x_t (B C h w) before a step, after it was taken and undone `jump_n_sample` - 1 times.

        The step is that of DDIM, which needs no state of the scheduler.

        Args:
            predict: x_t → the input of the network, and its prediction.
            draw: returns new noise (B C h w).
        """
        # A second-order scheduler calls the network twice for a step, the second time with what it has in its state.
        if not self.resamples or not getattr(scheduler, "state_in_first_order", True):
            return x
        (alpha, sigma), (next_alpha, next_sigma) = self.levels[step], self.levels[step + 1]
        if float(alpha) == 0:  # pure noise stays pure noise
            return x
        ratio = alpha / next_alpha
        added = (sigma**2 - (ratio * next_sigma) ** 2).clamp(min=0).sqrt()
        for _ in range(self.jump_n_sample - 1):
            clean = self._clean(*predict(x), alpha, sigma)
            noise = (x - alpha * clean) / sigma
            end = self.kept(step, next_alpha * clean + next_sigma * noise)
            x = ratio * end + added * draw()
        if getattr(scheduler, "last_sample", None) is not None:
            scheduler.last_sample = None  # UniPC would go back to the sample before, to correct its last step
        return x

    def kept(self, step: int, x: Tensor) -> Tensor:
        """Return x_t (B C h w) after a step, with the part to keep replaced; after the last step, it is clean."""
        return x if self.keep is None else torch.where(self.keep, self._noisy(step + 1), x)

    def _noisy(self, step: int) -> Tensor:
        alpha, sigma = self.levels[step]
        return alpha * self.x_0 + sigma * self.noise

    def _clean(self, scaled: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the clean sample that a prediction for the input `scaled` of the network means."""
        if self.prediction_type == SAMPLE:
            return prediction
        if self.prediction_type == FLOW:
            return scaled - sigma * prediction
        norm = (alpha**2 + sigma**2).sqrt()  # the input of the network has alpha² + sigma² = 1
        alpha, sigma = alpha / norm, sigma / norm
        if self.prediction_type == EPSILON:
            return (scaled - sigma * prediction) / alpha
        return alpha * scaled - sigma * prediction


def _levels(scheduler: Any, prediction_type: str) -> list[tuple[Tensor, Tensor]]:
    """Return alpha and sigma of x_t = alpha x_0 + sigma noise at each timestep of a scheduler, as it scales x_t."""
    times = scheduler.timesteps
    if prediction_type == FLOW:
        sigmas = scheduler.sigmas[: len(times)].to(times.device, torch.float32)
        return list(zip(1 - sigmas, sigmas))
    one, zero = torch.ones(len(times), device=times.device), torch.zeros(len(times), device=times.device)
    return list(zip(scheduler.add_noise(one, zero, times), scheduler.add_noise(zero, one, times)))
