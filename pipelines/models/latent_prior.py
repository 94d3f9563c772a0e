"""A prior over latent vectors: noise to latents that an encoder could have given, by flow matching.

Shapes: B latents, D their size, E hidden width.

This file is shipped beside the weights of published models, so it imports nothing of ours.
"""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

TIME_FEATURES = 256


class PriorBlock(nn.Module):
    """A residual perceptron whose scale, shift and gate come from the time (adaLN-Zero, Peebles and Xie 2023)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.modulation = nn.Linear(hidden_size, 3 * hidden_size)
        self.into = nn.Linear(hidden_size, 2 * hidden_size)
        self.out_of = nn.Linear(2 * hidden_size, hidden_size)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(time).chunk(3, dim=1)
        hidden = self.norm(x) * (1 + scale) + shift
        return x + gate * self.out_of(F.silu(self.into(hidden)))


class LatentPriorModel(ModelMixin, ConfigMixin):
    """The velocity, noise - latents, from noisy latents and the time (rectified flow: Liu et al. 2022).

    Args:
        latent_size: D; latents have about unit variance.
        hidden_size: E.
        num_layers: residual perceptrons.
    """

    @register_to_config
    def __init__(self, latent_size: int = 1024, hidden_size: int = 512, num_layers: int = 4):
        super().__init__()
        self.time_features = Timesteps(TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME_FEATURES, hidden_size)
        self.into = nn.Linear(latent_size, hidden_size)
        self.blocks = nn.ModuleList(PriorBlock(hidden_size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.out_of = nn.Linear(hidden_size, latent_size)
        # What a Gaussian's velocity is, a multiple of x that depends on the time, need not go through E numbers.
        self.share_of_x = nn.Linear(hidden_size, 1)
        for last in (self.out_of, self.share_of_x):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    def has_learned(self) -> bool:
        """False as long as the weights are those of a new model, whose velocity is zero everywhere."""
        return bool(self.out_of.weight.any() or self.share_of_x.weight.any())

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x: B D; timesteps: B, from 0 (latents) to 1000 (noise). B D."""
        time = F.silu(self.time_embedding(self.time_features(timesteps).to(self.into.weight.dtype)))
        hidden = self.into(x)
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.out_of(self.norm(hidden)) + self.share_of_x(time) * x
