"""The joint model of images and captions: its settings and their checks, and new models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from training.core.checks import check_deepest_feature_map, check_multiple, check_multiples
from training.core.options import Options, option


@dataclass
class ImageCaptionModelConfig(Options):
    """Architecture of the model; the names are those of ImageCaptionModel."""

    latent_size: int = option(1024, at_least=1)
    """Size of the latent vector"""
    max_length: int = option(100, at_least=3)
    """Maximum number of tokens per caption, including <START> and <END>; longer captions are truncated"""
    patch_size: int = option(4, at_least=1)
    """Side of the pixel patches that the convolutions work on"""
    block_out_channels: list[int] = option([128, 256, 384, 512])
    """Channels of each level; every level after the first halves the resolution"""
    layers_per_block: int = option(1, at_least=1)
    """Number of residual blocks per level"""
    norm_num_groups: int = option(32, at_least=1)
    """Number of groups for group normalization"""
    map_channels: int = option(32, at_least=1)
    """Number of channels of the feature map between the convolutions and the latent vector"""
    text_hidden_size: int = option(512, at_least=1)
    """Hidden size of the caption encoder and decoder"""
    num_attention_heads: int = option(8, at_least=1)
    """Number of attention heads of the caption encoder and decoder"""
    num_encoder_layers: int = option(4, at_least=1)
    """Number of layers of the caption encoder"""
    num_decoder_layers: int = option(6, at_least=1)
    """Number of layers of the caption decoder"""
    prefix_length: int = option(8, at_least=1)
    """Number of prefix tokens that pass the latent vector to the caption decoder"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        check_multiples(
            f"{prefix}block_out_channels", self.block_out_channels, f"{prefix}norm_num_groups", self.norm_num_groups
        )
        heads = f"{prefix}num_attention_heads"
        check_multiple(f"{prefix}text_hidden_size", self.text_hidden_size, heads, self.num_attention_heads)

    def check_resolution(self, resolution: int) -> None:
        """Raise UserError if the network cannot work on images of `resolution` pixels."""
        check_deepest_feature_map(
            resolution, self.patch_size, len(self.block_out_channels), "--model.block_out_channels"
        )


def build_model(config: ImageCaptionModelConfig, resolution: int, tokenizer: Any) -> Any:
    """Build an ImageCaptionModel with new weights for this tokenizer's vocabulary."""
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
    """Return one line with the parts of the model and their millions of parameters."""
    parts = []
    for name, module in modules.items():
        own = dict(module.named_children()) if name == "model" else {name: module}
        parts += [f"{key} {_millions(child)}" for key, child in own.items()]
    total = sum(p.numel() for module in modules.values() for p in module.parameters())
    return f"model of {total / 1e6:.1f} M parameters: {', '.join(parts)}"


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
