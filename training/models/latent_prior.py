"""Training of a latent prior beside the autoencoder whose latents it generates: flow matching over latent vectors.

B samples, D size of the latent vector.
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
    """The latent prior; the names of its architecture are those of LatentPriorModel."""

    hidden_size: int = option(512, at_least=0)
    """Hidden size of the prior; 0 trains no prior, and the pipeline then cannot generate new pairs"""
    num_layers: int = option(4, at_least=1)
    """Number of residual MLP blocks"""
    repeats: int = option(4, at_least=1)
    """Number of noise levels per latent in each step; the prior costs little compared with encoding the latents"""
    start: float = option(0.6, at_least=0, below=1, usual="0.6")
    """Fraction of training after which the prior starts to train; earlier, the latents still change, and a prior
    that tracks them becomes worse"""
    learning_rate: float | None = option(None, above=0)
    """Peak learning rate of the prior; if unset, --learning_rate is used"""


def build_latent_prior(config: LatentPriorConfig, latent_size: int) -> Any:
    """Build a LatentPriorModel with new weights for latent vectors of this size."""
    from pipelines.models.latent_prior import LatentPriorModel

    return LatentPriorModel(latent_size, config.hidden_size, config.num_layers)


class LatentPriorPhase(Phase):
    """The flow-matching loss on latents drawn from the encoder's posteriors; the encoder gets no gradient."""

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
        """Compute the loss of each latent vector (B D), averaged over `repeats` noise levels. B."""
        seen = []
        for repeat in range(repeats):
            # Other noise and noise levels in every repeat, and other ones than the autoencoder's.
            seen.append(self.diffusion.corrupt(latents, draws.variant(f"prior {repeat}"), sampling=sampling))
        predicted = self.prior(torch.cat([noisy.x_t for noisy in seen]), torch.cat([noisy.timesteps for noisy in seen]))
        losses = [noisy.loss(part) for noisy, part in zip(seen, predicted.chunk(repeats), strict=True)]
        return torch.stack(losses).mean(0)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            latents = self._latents(batch, draws)
        return self.losses(latents, draws, self.config.repeats).mean(), {}
