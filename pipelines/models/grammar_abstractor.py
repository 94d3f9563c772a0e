"""A poster's feature tensor to its design grammar: eight numbers about the layout, and how much text and how many
pictures there are.

Shapes: B posters, C feature channels, H W pixels, S side that the network works at.

This file is shipped beside the weights of published models, so it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class GrammarAbstractorOutput(BaseOutput):
    """What the abstractor says of every poster.

    Args:
        grammar: B × (numbers), in [0, 1].
        standardized: the same in units of the training data's deviation from its mean, not clipped.
        counts: one B × (largest count + 1) of logits for each thing that is counted.
    """

    grammar: Tensor
    standardized: Tensor
    counts: tuple[Tensor, ...]

    def counted(self) -> Tensor:
        """The likeliest counts, int64, B × (things counted)."""
        return torch.stack([logits.argmax(1) for logits in self.counts], 1)


class GrammarAbstractorModel(ModelMixin, ConfigMixin):
    """F_Tensor → V_Grammar and counts.

    A layout's numbers hang on where things are, so the network is told every cell's place, and its last feature map is
    read cell by cell rather than averaged.

    Args:
        in_channels: C: text, image, one per colour role, hierarchy; each in [0, 1].
        block_out_channels: channels of each level; every level halves the side.
        hidden_size: of the layer that reads the last feature map.
        num_grammar: numbers to predict.
        largest_counts: for each thing that is counted, the most there can be.
        sample_size: S; features of another size are averaged (or enlarged) to it.
        patch_size: p; the network works on p × p patches of the S × S cells, of which it sees every one.
        grammar_mean, grammar_std: of each number over the training posters; the network predicts in these units.
        dropout: before the last layers, while training.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 9,
        block_out_channels: Sequence[int] = (32, 64, 96, 128),
        hidden_size: int = 512,
        num_grammar: int = 8,
        largest_counts: Sequence[int] = (3, 3),
        sample_size: int = 64,
        norm_num_groups: int = 8,
        dropout: float = 0.1,
        patch_size: int = 1,
        grammar_mean: Sequence[float] | None = None,
        grammar_std: Sequence[float] | None = None,
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(patch_size)] if patch_size > 1 else []
        channels = (in_channels + 2) * patch_size**2
        for width in block_out_channels:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(norm_num_groups, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.GroupNorm(norm_num_groups, width),
                nn.SiLU(),
            ]
            channels = width
        self.body = nn.Sequential(*layers)
        cells = (sample_size // patch_size // 2 ** len(block_out_channels)) ** 2
        self.reader = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * cells, hidden_size), nn.SiLU(), nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Dropout(dropout),
        )  # fmt: skip
        self.grammar = nn.Linear(hidden_size, num_grammar)
        self.counts = nn.ModuleList(nn.Linear(hidden_size, largest + 1) for largest in largest_counts)

    def forward(self, features: Tensor) -> GrammarAbstractorOutput:
        """B C H W in [0, 1] (see `feature_channels`) → GrammarAbstractorOutput."""
        side = self.config.sample_size
        if features.shape[-2:] != (side, side):
            features = F.interpolate(features, size=(side, side), mode="area")
        place = torch.linspace(-1, 1, side, device=features.device, dtype=features.dtype)
        down, across = torch.meshgrid(place, place, indexing="ij")
        places = torch.stack([down, across]).expand(len(features), -1, -1, -1)
        hidden = self.reader(self.body(torch.cat([features, places], 1)))
        standardized = self.grammar(hidden).float()
        return GrammarAbstractorOutput(
            grammar=self.in_own_units(standardized).clamp(0, 1),
            standardized=standardized,
            counts=tuple(count(hidden).float() for count in self.counts),
        )

    def in_own_units(self, standardized: Tensor) -> Tensor:
        """Standardized numbers (B × numbers) as they are in the training data, about [0, 1]."""
        mean, std = (standardized.new_tensor(numbers) for numbers in self._scale())
        return mean + std * standardized

    def standardize(self, grammar: Tensor) -> Tensor:
        """The inverse of `in_own_units`."""
        mean, std = (grammar.new_tensor(numbers) for numbers in self._scale())
        return (grammar - mean) / std

    def _scale(self) -> tuple[list[float], list[float]]:
        count = self.config.num_grammar
        return list(self.config.grammar_mean or [0.5] * count), list(self.config.grammar_std or [0.25] * count)
