"""An AutoencoderKL that may work on patches of pixels.

Shapes: B batch, H W pixels, p patch side, C latent channels, h w latent cells; h = H / (p * 2 ** (levels - 1)).

At `patch_size` p the network sees an image of H/p x W/p cells with 3 p^2 channels (pixel unshuffle on the way in, pixel
shuffle on the way out) and spends nothing on full-resolution convolutions, where a stock autoencoder spends most of its
time. Images in, images out: callers never see the patches.

This file is shipped beside the weights of published models, so it imports nothing of ours.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from torch import nn


class WithShortcut(nn.Module):
    """`body(x) + shortcut(x)`: a linear map past an encoder or decoder, which then only learns what is not linear.

    A linear autoencoder is learned within a hundred steps; without the shortcut the network spends many hundreds on
    less. (The idea, not the form, of residual autoencoding: Chen et al. 2024, DC-AE.)
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self.body(x, *args, **kwargs) + self.shortcut(x)


class MultiHeadAutoencoderKL(AutoencoderKL):
    """`AutoencoderKL` with pixel patches; its other arguments, methods and outputs are those of `AutoencoderKL`.

    Args:
        patch_size: side of the pixel patches that the network works on; 1 is the stock architecture.
        in_channels, out_channels: channels of the images (not of the patches), which is what the config keeps.
        linear_shortcut: adds a linear map from pixels to latents, and back, beside encoder and decoder. With it the
            class is no stock one at `patch_size` 1 either.
        sample_size: side of an image in pixels; tiles of that size where tiling is enabled.
        scaling_factor: 1 by default, because an autoencoder of ours gets its latents' statistics measured
            (`latents_mean`, `latents_std`).

    Raises:
        ValueError: a patch size below 1.
    """

    encoder: nn.Module
    decoder: nn.Module

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        patch_size: int = 1,
        linear_shortcut: bool = False,
    ):
        if patch_size < 1:
            raise ValueError(f"`patch_size` must be at least 1, but is {patch_size}")
        super().__init__(
            in_channels=in_channels * patch_size**2,
            out_channels=out_channels * patch_size**2,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        # super().__init__ registered the patches' channels; from_config would multiply them a second time.
        self.register_to_config(in_channels=in_channels, out_channels=out_channels)
        if patch_size > 1:
            # Inside the encoder and decoder rather than around them, so that tiling and slicing see pixels, as they
            # do in the parent class.
            self.encoder.conv_in = nn.Sequential(nn.PixelUnshuffle(patch_size), self.encoder.conv_in)
            self.decoder.conv_out = nn.Sequential(self.decoder.conv_out, nn.PixelShuffle(patch_size))
        if linear_shortcut:
            factor = self.spatial_compression_ratio
            into = nn.Conv2d(in_channels, 2 * latent_channels, factor, stride=factor)
            out_of = nn.ConvTranspose2d(latent_channels, out_channels, factor, stride=factor)
            self.encoder = WithShortcut(self.encoder, into)
            self.decoder = WithShortcut(self.decoder, out_of)
        self.tile_latent_min_size: int = max(1, sample_size // self.spatial_compression_ratio)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent cell along a side, patches included."""
        return 2 ** (len(self.config.block_out_channels) - 1) * self.config.patch_size

    def autoencoder(self) -> AutoencoderKL:
        """The model without heads, sharing this one's weights: what a diffusion pipeline carries.

        Where `patch_size` is 1, and without a shortcut, that is a stock `AutoencoderKL`, which loads without this file.
        """
        if self.config.patch_size > 1 or self.config.linear_shortcut:
            return self
        names = AutoencoderKL._get_init_keys(AutoencoderKL) - {"self"}
        with torch.device("meta"):
            stock = AutoencoderKL(**{name: self.config[name] for name in names})
        for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
            setattr(stock, name, getattr(self, name))
        return stock.train(self.training)
