"""The networks of the poster stages: their settings and their checks, and new models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.common.poster_domain import COLOR_ROLES, COUNTS, GRAMMAR, MAX_PICTURES, MAX_TEXT_BLOCKS
from training.core.checks import check_deepest_feature_map, check_multiples
from training.core.options import Options, option

LARGEST_COUNTS = {"text_blocks": MAX_TEXT_BLOCKS, "pictures": MAX_PICTURES}


@dataclass
class _PosterNetworkConfig(Options):
    """Settings shared by the networks that read posters."""

    block_out_channels: list[int] = option([64, 128, 256, 512, 1024])
    """Channels of each level; every level after the first halves the resolution"""
    patch_size: int = option(1, at_least=1)
    """Side of the patches that the network works on; 2 takes about a quarter of the time of 1"""
    norm_num_groups: int = option(8, at_least=1)
    """Number of groups for group normalization"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        check_multiples(
            f"{prefix}block_out_channels", self.block_out_channels, f"{prefix}norm_num_groups", self.norm_num_groups
        )


@dataclass
class LayoutEncoderConfig(_PosterNetworkConfig):
    """Architecture of the layout encoder; the names are those of LayoutEncoderModel."""

    def check_resolution(self, resolution: int) -> None:
        """Raise UserError if the network cannot work on posters of this side."""
        levels = len(self.block_out_channels)
        check_deepest_feature_map(resolution, self.patch_size, levels, "--model.block_out_channels")


@dataclass
class AbstractorConfig(_PosterNetworkConfig):
    """Architecture of the grammar abstractor; the names are those of GrammarAbstractorModel."""

    block_out_channels: list[int] = option([32, 64, 96, 128])
    """Channels of each level; every level halves the resolution"""
    hidden_size: int = option(512, at_least=1)
    """Width of the fully connected layers after the last feature map"""
    sample_size: int = option(64, at_least=1)
    """Side to which the input features are resized"""
    dropout: float = option(0.1, at_least=0, below=1)
    """Dropout probability in the fully connected layers"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        first = 2 * self.patch_size  # here the first level halves the side as well
        check_deepest_feature_map(
            self.sample_size,
            first,
            len(self.block_out_channels),
            f"--{prefix}block_out_channels",
            f"--{prefix}sample_size",
        )


@dataclass
class BriefEncoderConfig(Options):
    """Architecture of the design brief encoder; the names are those of DesignBriefEncoder."""

    token_width: int = option(256, at_least=1)
    """Width of the tokens for cross-attention"""
    global_width: int = option(512, at_least=1)
    """Width of the vector that is added to the time embedding"""


def build_layout_encoder(config: LayoutEncoderConfig, resolution: int) -> Any:
    """Build a LayoutEncoderModel with new weights for posters of this side."""
    from pipelines.models.layout_encoder import LayoutEncoderModel

    return LayoutEncoderModel(
        block_out_channels=tuple(config.block_out_channels),
        patch_size=config.patch_size,
        norm_num_groups=config.norm_num_groups,
        num_color_roles=len(COLOR_ROLES),
        sample_size=resolution,
    )


def build_abstractor(config: AbstractorConfig, grammar_mean: list[float], grammar_std: list[float]) -> Any:
    """Build a GrammarAbstractorModel with new weights.

    Args:
        grammar_mean, grammar_std: mean and standard deviation of each grammar number over the training posters; the
            network predicts numbers standardized by them.
    """
    from pipelines.models.grammar_abstractor import GrammarAbstractorModel

    return GrammarAbstractorModel(
        in_channels=3 + len(COLOR_ROLES),
        block_out_channels=tuple(config.block_out_channels),
        hidden_size=config.hidden_size,
        num_grammar=len(GRAMMAR),
        largest_counts=tuple(LARGEST_COUNTS[name] for name in COUNTS),
        sample_size=config.sample_size,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        patch_size=config.patch_size,
        grammar_mean=grammar_mean,
        grammar_std=grammar_std,
    )
