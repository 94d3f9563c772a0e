"""Transformers on patches from a few settings, as denoisers in the place of U-Nets."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pipelines.tools.cli import UserError
from training.core.checks import check_multiple
from training.core.options import Options, option
from training.models.sizes import both_sides, sample_size

MOST_RESTART_LEVEL = 0.5


@dataclass
class TransformerConfig(Options):
    """The transformer (with --denoiser transformer)."""

    patch_size: int = option(8, at_least=1)
    """Side of a patch, in pixels or latent cells; the number of patches decides how long a step takes"""
    hidden_size: int = option(256, at_least=4)
    """Width of the layers"""
    num_layers: int = option(6, at_least=1)
    """Number of layers"""
    num_attention_heads: int = option(4, at_least=1)
    """Number of attention heads"""
    bottleneck_size: int = option(128, at_least=0)
    """Width through which the values of a patch enter (Li and He 2025); 0 connects them directly"""
    conv_layers: int = option(0, at_least=0)
    """Number of convolutions after the layers, at half of the resolution, which smooth the borders between patches and
    remove faint noise; they need an even --transformer.patch_size"""
    predicts_sample: bool = option(True)
    """Predict the clean image, and compute the flow from it (Li and He 2025); needed for large patches of pixels.
    Requires --prediction_type flow_prediction"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.conv_layers and self.patch_size % 2:
            raise UserError(
                f"--{prefix}conv_layers {self.conv_layers} needs an even --{prefix}patch_size, which is "
                f"{self.patch_size}; set one of them to another number"
            )
        check_multiple(
            f"{prefix}hidden_size", self.hidden_size, f"{prefix}num_attention_heads", self.num_attention_heads
        )


def build_transformer(
    config: TransformerConfig,
    channels: int,
    size: int | tuple[int, int],
    text_width: int | None,
    num_classes: int,
    condition_channels: int = 0,
    num_train_timesteps: int = 1000,
    least_noise_level: float = 0.0,
    vector_width: int | None = None,
) -> nn.Module:
    """Build a transformer with new weights.

    Args:
        channels: channels of the samples.
        size: side of the samples in cells, or (height, width).
        text_width: width of the text condition; None for a model without text.
        num_classes: number of classes; 0 for none. A last class is added, which stands for "no class".
        condition_channels: channels that are concatenated to the noisy samples.
        least_noise_level: noise level below which the training has hardly any samples.
        vector_width: width of the vectors that are passed as `class_labels`, in a model without classes.

    Raises:
        UserError: the side is not a multiple of the patch side.
    """
    from pipelines.models.patch_transformer import PatchTransformer2DModel

    for side in both_sides(size):
        if side % config.patch_size:
            raise UserError(
                f"--transformer.patch_size {config.patch_size} must divide the side of the samples, which is {side}"
            )
    return PatchTransformer2DModel(
        sample_size=sample_size(size),
        in_channels=channels + condition_channels,
        out_channels=channels,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        bottleneck_size=config.bottleneck_size,
        cross_attention_dim=text_width,
        num_class_embeds=num_classes + 1 if num_classes else None,
        class_embed_type="projection" if vector_width else None,
        projection_class_embeddings_input_dim=vector_width,
        predicts_sample=config.predicts_sample,
        num_train_timesteps=num_train_timesteps,
        conv_layers=config.conv_layers,
        least_noise_level=least_noise_level if config.predicts_sample else 0.0,
        restart_levels=restart_levels(least_noise_level) if config.predicts_sample else (),
    )


def restart_levels(least_noise_level: float) -> tuple[float, ...]:
    """Return the noise levels from which finished samples are denoised again; none without a least noise level.

    The lowest is the least one of the training, where details become final. Above 0.5, a restart would change what is
    in an image.
    """
    levels = (3 * least_noise_level, 2 * least_noise_level, least_noise_level)
    return tuple(round(level, 4) for level in levels if 0 < level <= MOST_RESTART_LEVEL)
