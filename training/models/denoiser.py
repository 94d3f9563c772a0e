"""The network that denoises, as the config of a latent diffusion model or a poster decoder describes it."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import nn

from pipelines.tools.cli import UserError
from training.core.checks import SMALLEST_MAP
from training.models.transformer import TransformerConfig, build_transformer
from training.models.unet import PixelUNetConfig, UNetConfig, build_pixel_unet, build_unet

LEAST_PATCHES = 2
"""Smallest number of patches along a side of a transformer's input."""


class _DenoiserConfig(Protocol):
    """The options that describe a network of either kind."""

    denoiser: Literal["unet", "transformer"]
    transformer: TransformerConfig
    num_train_timesteps: int
    prediction_type: str

    @property
    def least_noise_level(self) -> float: ...


class DenoiserConfig(_DenoiserConfig, Protocol):
    """The options that describe the network of a latent diffusion model."""

    model: UNetConfig


class PixelDenoiserConfig(_DenoiserConfig, Protocol):
    """The options that describe the network of a poster decoder."""

    model: PixelUNetConfig


def check_prediction(config: _DenoiserConfig) -> None:
    """Raise UserError if a transformer that predicts clean samples is trained on something other than flows."""
    if config.denoiser != "transformer" or not config.transformer.predicts_sample:
        return
    if config.prediction_type != "flow_prediction":
        raise UserError(
            f"--transformer.predicts_sample true requires --prediction_type flow_prediction, which is "
            f"{config.prediction_type}; set one of them"
        )


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


def build_pixel_denoiser(
    config: PixelDenoiserConfig, resolution: int, token_width: int, global_width: int
) -> nn.Module:
    """Build the U-Net or the transformer of a poster decoder with new weights; see `build_pixel_unet`."""
    if config.denoiser == "unet":
        return build_pixel_unet(config.model, resolution, token_width, global_width)
    return build_transformer(
        config.transformer,
        3,
        resolution,
        token_width,
        num_classes=0,
        num_train_timesteps=config.num_train_timesteps,
        least_noise_level=config.least_noise_level,
        vector_width=global_width,
    )
