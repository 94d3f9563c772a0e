"""GrammarAbstractorModel: predicts a poster's design grammar from its feature tensor (F_Tensor → V_Grammar): eight
numbers about the layout, and the counts of its elements.

Shapes: B posters, C feature channels, H W pixels, S side that the network works at.

This file is shipped beside the weights of published models, so it imports no other file of Halftone.
"""

from __future__ import annotations

import functools
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
    """Predictions of the abstractor.

    Args:
        grammar: B × (numbers), in [0, 1].
        standardized: the same numbers, standardized by the mean and deviation of the training data, not clipped.
        counts: logits B × (largest count + 1) for each count.
    """

    grammar: Tensor
    standardized: Tensor
    counts: tuple[Tensor, ...]

    def counted(self) -> Tensor:
        """Return the most likely counts, int64, B × (number of counts)."""
        return torch.stack([logits.argmax(1) for logits in self.counts], 1)


class GrammarAbstractorModel(ModelMixin, ConfigMixin):
    """Predict the grammar numbers and counts of posters from their features.

    The numbers of a layout depend on where its elements are. The coordinates of each cell are therefore input channels
    of the network, and its last feature map is flattened rather than averaged.

    Args:
        in_channels: number of feature channels C: text, image, one per colour role, hierarchy; each in [0, 1].
        block_out_channels: channels of each level; every level halves the side.
        hidden_size: width of the layers after the last feature map.
        num_grammar: number of grammar numbers to predict.
        largest_counts: largest value of each count.
        sample_size: side S of the network's input in cells; features of another size are resized by area.
        norm_num_groups: number of groups for group normalization.
        patch_size: side of the patches of cells that the network works on; no cell is left out.
        grammar_mean, grammar_std: mean and standard deviation of each number over the training posters; the network
            predicts numbers standardized by them.
        dropout: dropout in the layers after the last feature map, during training.
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
        """Predict from features B C H W in [0, 1], as `feature_channels` of the layout analysis gives them."""
        side = self.config.sample_size
        if features.shape[-2:] != (side, side):
            features = F.interpolate(features, size=(side, side), mode="area")
        place = torch.linspace(-1, 1, side, device=features.device, dtype=features.dtype)
        down, across = torch.meshgrid(place, place, indexing="ij")
        places = torch.stack([down, across]).expand(features.shape[0], -1, -1, -1)
        hidden = self.reader(self.body(torch.cat([features, places], 1)))
        standardized = self.grammar(hidden).float()
        return GrammarAbstractorOutput(
            grammar=self.in_own_units(standardized).clamp(0, 1),
            standardized=standardized,
            counts=tuple(count(hidden).float() for count in self.counts),
        )

    def in_own_units(self, standardized: Tensor) -> Tensor:
        """Convert standardized numbers (B × numbers) to the units of the training data, about [0, 1]."""
        mean, std = (_constant(tuple(n), standardized.dtype, standardized.device) for n in self._scale())
        return mean + std * standardized

    def standardize(self, grammar: Tensor) -> Tensor:
        """Standardize numbers; the inverse of `in_own_units`."""
        mean, std = (_constant(tuple(n), grammar.dtype, grammar.device) for n in self._scale())
        return (grammar - mean) / std

    def _scale(self) -> tuple[list[float], list[float]]:
        count = self.config.num_grammar
        return list(self.config.grammar_mean or [0.5] * count), list(self.config.grammar_std or [0.25] * count)


def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor. It is kept, as a copy to a GPU in every training step would make the process wait."""
    make = _make_constant.__wrapped__ if torch.compiler.is_compiling() else _make_constant
    return make(numbers, dtype, device)


@functools.lru_cache(maxsize=64)
def _make_constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)
