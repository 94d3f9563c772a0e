"""The network that denoises, as the config of a latent diffusion model describes it."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import nn

from training.core.checks import SMALLEST_MAP
from training.models.transformer import TransformerConfig, build_transformer
from training.models.unet import UNetConfig, build_unet

LEAST_PATCHES = 2
"""Smallest number of patches along a side of a transformer's input."""


class DenoiserConfig(Protocol):
    """The options that describe the network."""

    denoiser: Literal["unet", "transformer"]
    model: UNetConfig
    transformer: TransformerConfig
    num_train_timesteps: int

    @property
    def least_noise_level(self) -> float: ...


def divisor_of_sides(config: DenoiserConfig) -> tuple[int, int]:
    """Return the number of which the sides of the network's input must be multiples, and the smallest multiple."""
    if config.denoiser == "transformer":
        return config.transformer.patch_size, LEAST_PATCHES
    return 2 ** (len(config.model.block_out_channels) - 1), SMALLEST_MAP


def build_denoiser(
    config: DenoiserConfig,
    channels: int,
    size: int | tuple[int, int],
    text_width: int | None,
    num_classes: int,
    condition_channels: int = 0,
) -> nn.Module:
    """Build the U-Net or the transformer with new weights; see `build_unet` and `build_transformer`."""
    sizes = (channels, size, text_width, num_classes, condition_channels)
    if config.denoiser == "transformer":
        return build_transformer(
            config.transformer,
            *sizes,
            num_train_timesteps=config.num_train_timesteps,
            least_noise_level=config.least_noise_level,
        )
    return build_unet(config.model, *sizes)
