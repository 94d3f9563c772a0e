"""LatentPriorModel: generates latent vectors like those of an encoder from noise, by flow matching.

Shapes: B latents, D size of a latent, E hidden size.

This file is shipped beside the weights of published models, so it imports no other file of Halftone.
"""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

TIME_FEATURES = 256


class PriorBlock(nn.Module):
    """Residual MLP block with scale, shift and gate computed from the time (adaLN-Zero, Peebles and Xie 2023)."""

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
    """Predict the velocity, noise - latents, from noisy latents and the time (rectified flow: Liu et al. 2022).

    Args:
        latent_size: size D of the latents, which have about unit variance.
        hidden_size: width E of the residual blocks.
        num_layers: number of residual blocks.
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
        # For Gaussian latents the velocity is x times a factor that depends on the time. This factor is predicted
        # directly, so that x does not have to pass through the hidden layers for it.
        self.share_of_x = nn.Linear(hidden_size, 1)
        for last in (self.out_of, self.share_of_x):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    def has_learned(self) -> bool:
        """Whether the model has been trained; a new model predicts a velocity of zero everywhere."""
        return bool(self.out_of.weight.any() or self.share_of_x.weight.any())

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the velocity (B D) of x (B D) at timesteps (B, from 0 for latents to 1000 for noise)."""
        time = F.silu(self.time_embedding(self.time_features(timesteps).to(self.into.weight.dtype)))
        hidden = self.into(x)
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.out_of(self.norm(hidden)) + self.share_of_x(time) * x
