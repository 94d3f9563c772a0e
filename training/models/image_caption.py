"""The joint model of pictures and captions as configured: flags, checks, and fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from pipelines.tools.cli import UserError
from training.core.checks import check_at_least, check_deepest_feature_map


@dataclass
class ImageCaptionModelConfig:
    """The model; names are those of ImageCaptionModel."""

    latent_size: int = 1024
    """Numbers in the latent vector"""
    max_length: int = 100
    """Tokens per caption, <START> and <END> included; longer ones are cut"""
    patch_size: int = 4
    """Side of the pixel patches that the convolutions work on"""
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 384, 512])
    """Channels of each level; every one after the first halves the side"""
    layers_per_block: int = 1
    """Residual blocks per level"""
    norm_num_groups: int = 32
    """Groups of the group norms"""
    map_channels: int = 32
    """Channels of the map between convolutions and latent vector"""
    text_hidden_size: int = 512
    """Width of both Transformers"""
    num_attention_heads: int = 8
    """Attention heads of both"""
    num_encoder_layers: int = 4
    """Layers of the caption's encoder"""
    num_decoder_layers: int = 6
    """Layers of the caption's decoder"""
    prefix_length: int = 8
    """Tokens before a caption that tell its decoder the latent vector"""


def validate_model_config(config: ImageCaptionModelConfig, resolution: int) -> None:
    """Raises UserError for numbers that do not go together."""
    counts = asdict(config)
    widths = counts.pop("block_out_channels")
    for name, value in counts.items():
        check_at_least(f"model.{name}", value, 3 if name == "max_length" else 1)
    if not widths or any(width < 1 or width % config.norm_num_groups for width in widths):
        raise UserError(
            f"--model.block_out_channels {widths} must be multiples of --model.norm_num_groups {config.norm_num_groups}"
        )
    if config.text_hidden_size % config.num_attention_heads:
        raise UserError(
            f"--model.text_hidden_size {config.text_hidden_size} must be a multiple of "
            f"--model.num_attention_heads {config.num_attention_heads}"
        )
    check_deepest_feature_map(resolution, config.patch_size, len(widths), "--model.block_out_channels")


def build_model(config: ImageCaptionModelConfig, resolution: int, tokenizer: Any) -> Any:
    """An ImageCaptionModel with fresh weights for this tokenizer's vocabulary."""
    from pipelines.models.image_caption_model import ImageCaptionModel

    return ImageCaptionModel(
        **asdict(config) | {"block_out_channels": tuple(config.block_out_channels)},
        sample_size=resolution,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        start_token_id=tokenizer.bos_token_id,
        end_token_id=tokenizer.eos_token_id,
        unknown_token_id=tokenizer.unk_token_id,
    )


def model_summary(modules: Mapping[str, nn.Module]) -> str:
    """What there is to train, in one line: parts and millions of parameters."""
    parts = []
    for name, module in modules.items():
        own = dict(module.named_children()) if name == "model" else {name: module}
        parts += [f"{key} {_millions(child)}" for key, child in own.items()]
    total = sum(p.numel() for module in modules.values() for p in module.parameters())
    return f"model of {total / 1e6:.1f} M parameters: {', '.join(parts)}"


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
