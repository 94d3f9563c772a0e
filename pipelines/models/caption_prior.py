"""What a caption says of a picture before any noise is looked at: the expected latents, E[x_0 | caption].

Shapes: B captions, L tokens, D text width, C latent channels, h w latent cells.

A U-Net learns late which words decide where things are: its attention has no sense of place, and only the noisiest
steps have anything to gain. Regression from captions to latents learns it at once. Its answer, a blurred mean of all
pictures with such a caption, goes into the U-Net beside the noisy latents, as a U-Net for inpainting takes its mask.

This file is shipped beside the weights of published models, so it imports nothing of ours.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class CaptionPrior(ModelMixin, ConfigMixin):
    """Text states to expected latents, by a perceptron over their mean.

    Args:
        text_width: D.
        latent_channels, latent_height, latent_width: C, h, w that it was trained at.
        hidden_size: of its two hidden layers.
        dropout: in them, while training.
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
        """B L D → B C h w, in units of scaled latents; `size` (h, w) other than the trained one is interpolated."""
        shape = (self.config.latent_channels, self.config.latent_height, self.config.latent_width)
        expected = self.layers(text_states.mean(1)).unflatten(1, shape)
        if size is not None and tuple(size) != shape[1:]:
            expected = nn.functional.interpolate(expected, size=tuple(size), mode="bilinear")
        return expected
