"""U-Nets as configured: stock `diffusers.UNet2DConditionModel`, from a few numbers.

`build_unet` is for latents and captions, `build_pixel_unet` for pictures and design briefs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pipelines.tools.cli import UserError
from training.core.checks import check_deepest_feature_map, check_multiples
from training.core.options import Options, option


@dataclass
class _UNetShape(Options):
    """Names are those of diffusers.UNet2DConditionModel where it has them."""

    block_out_channels: list[int] = option([128, 192])
    """Channels per resolution; each after the first halves it"""
    layers_per_block: int = option(2, at_least=1)
    """Residual blocks per resolution on the way down; one more on the way up"""
    attention_head_dim: int = option(32, at_least=1)
    """Channels of one attention head"""
    transformer_layers_per_block: int = option(1, at_least=1)
    """Transformer layers in each attention block"""
    norm_num_groups: int = option(32, at_least=1)
    """Groups of the group normalization"""
    dropout: float = option(0.0, at_least=0, below=1)
    """Dropout in residual blocks"""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = option("scale_shift")
    """How the time embedding acts on residual blocks: added, or as scale and shift"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        for name in ("norm_num_groups", "attention_head_dim"):
            check_multiples(f"{prefix}block_out_channels", self.block_out_channels, prefix + name, getattr(self, name))


@dataclass
class UNetConfig(_UNetShape):
    """The U-Net of latents."""

    attention_levels: list[int] = option([0, 1])
    """Resolutions with attention, 0 the highest; [] for none but the middle's"""
    text_in_time_embedding: bool = option(True)
    """The caption as a whole, pooled by attention, joins the time embedding (addition_embed_type text)"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        levels = len(self.block_out_channels)
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise UserError(f"--{prefix}attention_levels {self.attention_levels} must lie in 0 to {levels - 1}")


@dataclass
class PixelUNetConfig(_UNetShape):
    """The U-Net of images."""

    block_out_channels: list[int] = option([64, 128, 256, 384])
    """Channels per resolution; each after the first halves it"""
    attention_resolutions: list[int] = option([32])
    """Sides of the feature maps with attention, to themselves and to the brief, down and up; [] for none at all"""

    def check_resolution(self, resolution: int) -> None:
        """Raise UserError for a network that does not suit images of this side."""
        check_deepest_feature_map(resolution, 1, len(self.block_out_channels), "--model.block_out_channels")
        sides = feature_map_sides(self, resolution)
        for side in self.attention_resolutions:
            if side not in sides:
                raise UserError(
                    f"--model.attention_resolutions has {side}, but at --resolution {resolution} the network's "
                    f"resolutions are {', '.join(map(str, sides))}; choose among them, or [] for no attention"
                )


def feature_map_sides(config: _UNetShape, resolution: int) -> list[int]:
    """Sides of the network's feature maps, the largest first."""
    return [resolution // 2**level for level in range(len(config.block_out_channels))]


def build_unet(
    config: UNetConfig,
    channels: int,
    size: int,
    text_width: int | None,
    num_classes: int,
    condition_channels: int = 0,
) -> nn.Module:
    """A U-Net with fresh weights for latents of `channels` × `size` × `size`.

    Args:
        text_width: of the text condition; None builds one without text, whose attention is self-attention alone.
        num_classes: 0 for none; else one class more is made, the last, for "no class".
        condition_channels: channels that are put beside the noisy latents.

    Raises:
        UserError: latents too small for the number of levels.
    """
    levels = len(config.block_out_channels)
    check_deepest_feature_map(size, 1, levels, "--model.block_out_channels", "the latents' side")
    attends = [level in config.attention_levels for level in range(levels)]
    return _stock_unet(
        config,
        attends,
        middle_attends=bool(text_width),
        text_width=text_width,
        sample_size=size,
        in_channels=channels + condition_channels,
        out_channels=channels,
        num_class_embeds=num_classes + 1 if num_classes else None,
        addition_embed_type="text" if text_width and config.text_in_time_embedding else None,
        addition_embed_type_num_heads=_pooling_heads(text_width) if text_width else 64,
    )


def build_pixel_unet(config: PixelUNetConfig, resolution: int, token_width: int, global_width: int) -> nn.Module:
    """A U-Net with fresh weights for RGB pictures of this side, steered by a brief.

    Args:
        token_width: of the tokens that attention looks at.
        global_width: of the vector that joins the time embedding, and with it every residual block (the stock
            class_embed_type "projection"; it is given as `class_labels`).
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
    """`attends`: which resolutions have attention, the highest first; `text_width`: of the tokens attended to."""
    import diffusers

    with_attention = "CrossAttn{}Block2D" if text_width else "Attn{}Block2D"
    # Diffusers means the number of heads by attention_head_dim where attention is of text, and their width elsewhere.
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
    """Attention heads that pool a caption: of 16 channels where that divides the width."""
    return text_width // 16 if text_width % 16 == 0 else 1
