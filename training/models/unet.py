"""U-Nets from a few settings: stock `diffusers.UNet2DConditionModel`.

`build_unet` builds one for latents and captions, `build_pixel_unet` one for images and design briefs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pipelines.tools.cli import UserError
from training.core.checks import check_deepest_feature_map, check_multiples
from training.core.options import Options, option
from training.models.sizes import both_sides, sample_size


@dataclass
class _UNetShape(Options):
    """Settings shared by both U-Nets; the names are those of diffusers.UNet2DConditionModel where it has them."""

    block_out_channels: list[int] = option([128, 192])
    """Channels of each level; every level after the first halves the resolution"""
    layers_per_block: int = option(2, at_least=1)
    """Number of residual blocks per level on the way down; each level has one more on the way up"""
    attention_head_dim: int = option(32, at_least=1)
    """Number of channels per attention head"""
    transformer_layers_per_block: int = option(1, at_least=1)
    """Number of Transformer layers in each attention block"""
    norm_num_groups: int = option(32, at_least=1)
    """Number of groups for group normalization"""
    dropout: float = option(0.0, at_least=0, below=1)
    """Dropout probability in residual blocks"""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = option("scale_shift")
    """How residual blocks use the time embedding: default adds it, scale_shift takes scale and shift from it"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        for name in ("norm_num_groups", "attention_head_dim"):
            check_multiples(f"{prefix}block_out_channels", self.block_out_channels, prefix + name, getattr(self, name))


@dataclass
class UNetConfig(_UNetShape):
    """The U-Net for latents."""

    attention_levels: list[int] = option([0, 1])
    """Levels with attention, where 0 has the highest resolution; [] leaves attention only in the middle block"""
    text_in_time_embedding: bool = option(True)
    """Add the whole caption, pooled by attention, to the time embedding (addition_embed_type text)"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        levels = len(self.block_out_channels)
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise UserError(
                f"--{prefix}attention_levels {self.attention_levels} must lie in 0 to {levels - 1}, because "
                f"--{prefix}block_out_channels has {levels} levels"
            )


@dataclass
class PixelUNetConfig(_UNetShape):
    """The U-Net for images."""

    block_out_channels: list[int] = option([64, 128, 256, 384])
    """Channels of each level; every level after the first halves the resolution"""
    attention_resolutions: list[int] = option([32])
    """Sides of the feature maps with self-attention and with cross-attention to the brief; [] disables attention"""

    def check_resolution(self, resolution: int) -> None:
        """Raise UserError if the network cannot work on images of this side."""
        check_deepest_feature_map(resolution, 1, len(self.block_out_channels), "--model.block_out_channels")
        sides = feature_map_sides(self, resolution)
        for side in self.attention_resolutions:
            if side not in sides:
                raise UserError(
                    f"--model.attention_resolutions has {side}, but at --resolution {resolution} the network's "
                    f"resolutions are {', '.join(map(str, sides))}; choose among them, or use [] for no attention"
                )


def feature_map_sides(config: _UNetShape, resolution: int) -> list[int]:
    """Return the sides of the network's feature maps, the largest first."""
    return [resolution // 2**level for level in range(len(config.block_out_channels))]


def build_unet(
    config: UNetConfig,
    channels: int,
    size: int | tuple[int, int],
    text_width: int | None,
    num_classes: int,
    condition_channels: int = 0,
) -> nn.Module:
    """Build a U-Net with new weights.

    Args:
        channels: channels of the latents.
        size: side of the latents in cells, or (height, width).
        text_width: width of the text condition; None builds a U-Net without text, which has only self-attention.
        num_classes: number of classes; 0 for none. A last class is added, which stands for "no class".
        condition_channels: channels that are concatenated to the noisy latents.

    Raises:
        UserError: the latents are too small for the number of levels.
    """
    levels = len(config.block_out_channels)
    for side in both_sides(size):
        check_deepest_feature_map(side, 1, levels, "--model.block_out_channels", "side of the latents")
    attends = [level in config.attention_levels for level in range(levels)]
    return _stock_unet(
        config,
        attends,
        middle_attends=bool(text_width),
        text_width=text_width,
        sample_size=sample_size(size),
        in_channels=channels + condition_channels,
        out_channels=channels,
        num_class_embeds=num_classes + 1 if num_classes else None,
        addition_embed_type="text" if text_width and config.text_in_time_embedding else None,
        addition_embed_type_num_heads=_pooling_heads(text_width) if text_width else 64,
    )


def build_pixel_unet(config: PixelUNetConfig, resolution: int, token_width: int, global_width: int) -> nn.Module:
    """Build a U-Net with new weights for RGB images of this side, conditioned on a design brief.

    Args:
        token_width: width of the tokens for cross-attention.
        global_width: width of the vector that is added to the time embedding and so reaches every residual block (the
            stock class_embed_type "projection"; it is passed as `class_labels`).
    """
    attends = [side in config.attention_resolutions for side in feature_map_sides(config, resolution)]
    return _stock_unet(
        config,
        attends,
        middle_attends=attends[-1],  # the middle works at the lowest resolution
        text_width=token_width,
        sample_size=resolution,
        in_channels=3,
        out_channels=3,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=global_width,
    )


def _stock_unet(
    config: _UNetShape, attends: Sequence[bool], *, middle_attends: bool, text_width: int | None, **options: Any
) -> nn.Module:
    """Build the stock U-Net.

    Args:
        attends: whether each level has attention, from the highest resolution to the lowest.
        text_width: width of the tokens for cross-attention; None leaves only self-attention.
    """
    import diffusers

    with_attention = "CrossAttn{}Block2D" if text_width else "Attn{}Block2D"
    # In Diffusers, attention_head_dim is the number of heads for cross-attention, and the width of a head elsewhere.
    heads = [width // config.attention_head_dim for width in config.block_out_channels]
    return diffusers.UNet2DConditionModel(
        down_block_types=tuple((with_attention if a else "{}Block2D").format("Down") for a in attends),
        mid_block_type="UNetMidBlock2DCrossAttn" if middle_attends else "UNetMidBlock2D",
        up_block_types=tuple((with_attention if a else "{}Block2D").format("Up") for a in reversed(attends)),
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        transformer_layers_per_block=config.transformer_layers_per_block,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        cross_attention_dim=text_width or config.block_out_channels[0],
        attention_head_dim=tuple(heads) if text_width else (config.attention_head_dim,) * len(attends),
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        **options,
    )


def _pooling_heads(text_width: int) -> int:
    """Return the number of attention heads that pool a caption: heads of 16 channels if 16 divides the width, or 1."""
    return text_width // 16 if text_width % 16 == 0 else 1
