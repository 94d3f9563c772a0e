"""DesignBriefEncoder: encodes a design brief for a U-Net, as a token for each field and one vector for the whole brief.

Shapes: B briefs, L fields (tokens), D token width, E width of the global vector, F Fourier features.

This file is shipped beside the weights of published models, so it imports no other file of Halftone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor, nn


def fourier_features(x: Tensor, num_frequencies: int) -> Tensor:
    """Return x and the sin and cos of π 2^k x, for k < `num_frequencies` (Mildenhall et al. 2020, eq. 4).

    They lie along a new last axis of size F = 1 + 2 × num_frequencies.
    """
    angles = x[..., None] * (math.pi * 2.0 ** torch.arange(num_frequencies, device=x.device))
    return torch.cat([x[..., None], angles.sin(), angles.cos()], -1)


class DesignBriefEncoder(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Encode brief tensors as tokens and a global vector. Each field has a learned null token for absent values.

    Args:
        token_width: width D of the tokens.
        global_width: width E of the global vector.
        num_styles: number of styles.
        num_numbers: number of fields that are numbers in [0, 1].
        max_counts: largest value of each field that is a count.
        palette_colors: maximum number of colours in a palette.
        num_frequencies: number of frequencies in the Fourier features of numbers and colours.
    """

    @register_to_config
    def __init__(
        self,
        token_width: int = 256,
        global_width: int = 512,
        num_styles: int = 8,
        num_numbers: int = 11,
        max_counts: Sequence[int] = (3, 3),
        palette_colors: int = 5,
        num_frequencies: int = 4,
    ):
        super().__init__()
        features = 1 + 2 * num_frequencies
        self.style = nn.Embedding(num_styles, token_width)
        self.numbers = nn.ModuleList(nn.Linear(features, token_width) for _ in range(num_numbers))
        self.counts = nn.ModuleList(nn.Embedding(most + 1, token_width) for most in max_counts)
        self.color = nn.Linear(3 * features, token_width)
        self.palette_position = nn.Parameter(torch.randn(palette_colors, token_width))
        self.null = nn.Parameter(torch.randn(self.num_tokens, token_width))
        self.mlp = nn.Sequential(
            nn.LayerNorm(token_width),
            nn.Linear(token_width, 2 * token_width),
            nn.SiLU(),
            nn.Linear(2 * token_width, token_width),
        )
        self.norm = nn.LayerNorm(token_width)
        self.whole = nn.Sequential(nn.Flatten(), nn.Linear(self.num_tokens * token_width, global_width), nn.SiLU())

    @property
    def num_tokens(self) -> int:
        """Number of tokens L, which are in the order style, numbers, counts, palette."""
        return 1 + self.config.num_numbers + len(self.config.max_counts) + self.config.palette_colors

    def forward(
        self,
        style: Tensor,
        numbers: Tensor,
        counts: Tensor,
        palette: Tensor,
        style_present: Tensor,
        numbers_present: Tensor,
        counts_present: Tensor,
        palette_present: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Encode the tensors of `design_brief.brief_tensors` as tokens (B L D) and a global vector (B E).

        Args:
            style: B 1, int64.
            numbers: B num_numbers, in [0, 1].
            counts: B len(max_counts), int64.
            palette: B palette_colors 3, in [0, 1].
            style_present, numbers_present, counts_present, palette_present: bool, B and the number of these fields;
                False where a field is absent.
        """
        # The features are computed in float32 and cast afterwards: sines of 8 π x need more digits than bfloat16 has.
        number_features = fourier_features(numbers.float(), self.config.num_frequencies).to(self.dtype)
        color_features = fourier_features(palette.float(), self.config.num_frequencies).flatten(2).to(self.dtype)
        tokens = [
            self.style(style),
            torch.stack([layer(number_features[:, i]) for i, layer in enumerate(self.numbers)], 1),
            torch.stack([table(counts[:, i]) for i, table in enumerate(self.counts)], 1),
            self.color(color_features) + self.palette_position,
        ]
        present = torch.cat([style_present, numbers_present, counts_present, palette_present], 1)
        x = torch.where(present[..., None], torch.cat(tokens, 1), self.null)
        x = self.norm(x + self.mlp(x))
        return x, self.whole(x)
