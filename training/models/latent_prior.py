"""A latent prior trained beside the autoencoder whose latents it draws: flow matching over latent vectors.

B samples, D latent vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.core.draws import Draws
from training.core.options import Options, option
from training.core.stage import Batch, Phase
from training.objectives.diffusion import Diffusion, DiffusionConfig


@dataclass
class LatentPriorConfig(Options):
    """The prior; names are those of LatentPriorModel, where it has them."""

    hidden_size: int = option(512, at_least=0)
    """Width; 0 trains no prior, and the pipeline invents no pairs"""
    num_layers: int = option(4, at_least=1)
    """Residual perceptrons"""
    repeats: int = option(4, at_least=1)
    """Noise levels at which each latent is trained in a step: the prior is cheap to run, and the latents are not"""
    start: float = option(0.6, at_least=0, below=1, usual="0.6")
    """Fraction of training after which the prior starts; earlier, the latents still change, and a prior that tracks
    them ends up worse"""
    learning_rate: float | None = option(None, above=0)
    """Unset: that of the autoencoder"""


def build_latent_prior(config: LatentPriorConfig, latent_size: int) -> Any:
    """A LatentPriorModel with fresh weights for latent vectors of this size."""
    from pipelines.models.latent_prior import LatentPriorModel

    return LatentPriorModel(latent_size, config.hidden_size, config.num_layers)


class LatentPriorPhase(Phase):
    """The flow-matching loss on latents that are drawn from their encoder's posteriors; the encoder learns nothing."""

    name = "prior"

    def __init__(self, prior: nn.Module, config: LatentPriorConfig, latents: Callable[[Batch, Draws], Tensor]):
        super().__init__()
        self.prior, self.config = prior, config
        self.learning_rate = config.learning_rate
        self.diffusion = Diffusion(DiffusionConfig(prediction_type="flow_prediction"))
        self._latents = latents

    def first_step(self, total_steps: int) -> int:
        return int(self.config.start * total_steps)

    def losses(self, latents: Tensor, draws: Draws, repeats: int, sampling: str | None = None) -> Tensor:
        """The loss of each latent vector (B D), the mean over `repeats` noise levels. B."""
        seen = []
        for repeat in range(repeats):
            own = Draws(draws.seed, f"{draws.step}, prior {repeat}", draws.positions, draws.device)
            seen.append(self.diffusion.corrupt(latents, own, sampling=sampling))
        predicted = self.prior(torch.cat([noisy.x_t for noisy in seen]), torch.cat([noisy.timesteps for noisy in seen]))
        losses = [noisy.loss(part) for noisy, part in zip(seen, predicted.chunk(repeats), strict=True)]
        return torch.stack(losses).mean(0)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            latents = self._latents(batch, draws)
        return self.losses(latents, draws, self.config.repeats).mean(), {}
