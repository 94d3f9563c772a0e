"""CaptionPrior: predicts the expected latents of an image from its caption alone, E[x_0 | caption].

Shapes: B captions, L tokens, D text width, C latent channels, h w latent cells.

A U-Net learns only late which words decide where things are: its cross-attention does not know positions, and only the
noisiest steps benefit from this knowledge. Regression from captions to latents learns it at once. Its prediction, a
blurred mean of all images with such a caption, is concatenated to the noisy latents, as the mask is in a U-Net for
inpainting.

This file is shipped beside the weights of published models, so it imports no other file of Halftone.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class CaptionPrior(ModelMixin, ConfigMixin):
    """Predict the expected latents from the mean of the text states with an MLP.

    Args:
        text_width: width D of the text states.
        latent_channels, latent_height, latent_width: shape C, h, w of the latents in training.
        hidden_size: width of the two hidden layers.
        dropout: dropout in the hidden layers during training.
    """

    @register_to_config
    def __init__(
        self,
        text_width: int,
        latent_channels: int,
        latent_height: int,
        latent_width: int,
        hidden_size: int = 512,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(text_width),
            nn.Linear(text_width, hidden_size), nn.SiLU(), nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Dropout(dropout),
            nn.Linear(hidden_size, latent_channels * latent_height * latent_width),
        )  # fmt: skip

    def forward(self, text_states: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Predict latents (B C h w, in scaled units) from text states (B L D), interpolated to `size` (h, w)."""
        shape = (self.config.latent_channels, self.config.latent_height, self.config.latent_width)
        expected = self.layers(text_states.mean(1)).unflatten(1, shape)
        if size is not None and tuple(size) != shape[1:]:
            expected = nn.functional.interpolate(expected, size=tuple(size), mode="bilinear")
        return expected
