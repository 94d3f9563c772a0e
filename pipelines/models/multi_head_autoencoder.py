"""MultiHeadAutoencoderKL: an AutoencoderKL that can work on patches of pixels, and can have heads for segmentation and
classification.

Shapes: B batch, H W pixels, p patch side, C latent channels, h w latent cells; h = H / (p * 2 ** (levels - 1)).
K pixel classes, N image classes.

With `patch_size` p, the network sees an image of H/p x W/p cells with 3 p^2 channels (pixel unshuffle at the input,
pixel shuffle at the output). This saves the full-resolution convolutions, where a stock autoencoder spends most of its
time. Inputs and outputs are images as usual; callers never see the patches.

The segmentation head reads the decoder's last features, and the classification head reads the latents. Both predict
from latents, so they also work on generated latents. All latents in this file are in the autoencoder's own (raw) units.

This file is shipped beside the weights of published models, so it imports no other file of Halftone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

NO_HEADS = {"num_mask_classes": 0, "num_classes": 0, "id2mask_class": None, "id2label": None}


@dataclass
class MaskedDecoderOutput(BaseOutput):
    """Decoded images and the class logits of their pixels.

    Args:
        sample: B 3 H W.
        mask_logits: B K H W.
    """

    sample: Tensor
    mask_logits: Tensor


class WithShortcut(nn.Module):
    """`body(x) + shortcut(x)`: an encoder or decoder with a linear map beside it, so that it only learns the rest.

    A linear autoencoder is learned within a hundred steps; without the shortcut, the network needs many hundreds of
    steps for a worse result. (The idea is that of residual autoencoding, in another form: Chen et al. 2024, DC-AE.)
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.body(x, *args, **kwargs) + self.shortcut(x)


def segmentation_head(channels: int, num_classes: int, patch_size: int) -> nn.Sequential:
    """Build a head that maps features (B channels H/p W/p) to logits (B num_classes H W)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(channels, num_classes * patch_size**2, 3, padding=1),
        nn.PixelShuffle(patch_size),
    )


def classification_head(latent_channels: int, channels: int, norm_num_groups: int, num_classes: int) -> nn.Sequential:
    """Build a head that maps latents (B latent_channels h w, any h and w) to logits (B num_classes).

    Normalization comes only after a convolution: normalizing the latents would hide their magnitude from the head.
    """
    return nn.Sequential(
        nn.Conv2d(latent_channels, channels, 3, padding=1),
        nn.GroupNorm(norm_num_groups, channels),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        nn.GroupNorm(norm_num_groups, channels),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, num_classes),
    )


class MultiHeadAutoencoderKL(AutoencoderKL):
    """`AutoencoderKL` with pixel patches and heads; all other arguments, methods and outputs are those of its parent.

    Without heads (the default), the weights have the names of the parent class, except those of patches and shortcut.

    Args:
        patch_size: side of the pixel patches that the network works on; 1 is the stock architecture.
        in_channels, out_channels: channels of the images (not of the patches); the config keeps these numbers.
        linear_shortcut: adds a linear map from pixels to latents, and one back, beside encoder and decoder. The model
            is then not a stock one, even with `patch_size` 1.
        sample_size: side of an image in pixels, and of a tile if tiling is enabled.
        scaling_factor: 1 by default, because training measures the statistics of the latents and writes them to
            `latents_mean` and `latents_std`.
        num_mask_classes: number of pixel classes K of the segmentation head; 0 for no such head.
        num_classes: number of image classes N of the classification head; 0 for no such head.
        id2mask_class, id2label: names by class id; the config keeps the ids as strings, as JSON does.

    Raises:
        ValueError: `patch_size` is below 1, a head has one class, or there is not one name for each class.
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
        num_mask_classes: int = 0,
        num_classes: int = 0,
        id2mask_class: Mapping[int | str, str] | None = None,
        id2label: Mapping[int | str, str] | None = None,
    ):
        if patch_size < 1:
            raise ValueError(f"`patch_size` must be at least 1, but is {patch_size}")
        mask_names = _class_names("num_mask_classes", num_mask_classes, "id2mask_class", id2mask_class)
        label_names = _class_names("num_classes", num_classes, "id2label", id2label)
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
        # super().__init__ registered the channels of patches, which from_config would multiply a second time.
        self.register_to_config(in_channels=in_channels, out_channels=out_channels)
        self.register_to_config(id2mask_class=mask_names, id2label=label_names)
        self._take_patches()
        self._add_heads()
        self.tile_latent_min_size: int = max(1, sample_size // self.spatial_compression_ratio)

    def _take_patches(self) -> None:
        """Add patches at both ends of the network and linear shortcuts beside it, as configured."""
        config, patch_size = self.config, self.config.patch_size
        if patch_size > 1:
            # Inside the encoder and decoder rather than around them, so that tiling and slicing see pixels, as they
            # do in the parent class.
            self.encoder.conv_in = nn.Sequential(nn.PixelUnshuffle(patch_size), self.encoder.conv_in)
            self.decoder.conv_out = nn.Sequential(self.decoder.conv_out, nn.PixelShuffle(patch_size))
        if config.linear_shortcut:
            factor, channels = self.spatial_compression_ratio, config.latent_channels
            into = nn.Conv2d(config.in_channels, 2 * channels, factor, stride=factor)
            out_of = nn.ConvTranspose2d(channels, config.out_channels, factor, stride=factor)
            self.encoder = WithShortcut(self.encoder, into)
            self.decoder = WithShortcut(self.decoder, out_of)

    def _add_heads(self) -> None:
        config = self.config
        first, last = config.block_out_channels[0], config.block_out_channels[-1]
        if config.num_mask_classes:
            self.segmentation_head = segmentation_head(first, config.num_mask_classes, config.patch_size)
        if config.num_classes:
            self.classification_head = classification_head(
                config.latent_channels, last, config.norm_num_groups, config.num_classes
            )

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent cell along a side, patches included."""
        return 2 ** (len(self.config.block_out_channels) - 1) * self.config.patch_size

    @apply_forward_hook
    def decode_with_masks(self, z: Tensor) -> MaskedDecoderOutput:
        """Decode latents to images and the class logits of their pixels, in one pass through the decoder.

        Args:
            z: B C h w. Tiling and slicing apply only to `decode`.

        Raises:
            ValueError: the model has no segmentation head.
        """
        z, features = self._decoder_features(z)
        sample = self._decoder_body.conv_out(features)
        if self.config.linear_shortcut:
            sample = sample + self.decoder.shortcut(z)
        return MaskedDecoderOutput(sample=sample, mask_logits=self.segmentation_head(features))

    @apply_forward_hook
    def segment(self, z: Tensor) -> Tensor:
        """Return the class logits of every pixel, B K H W, from latents B C h w.

        Raises:
            ValueError: the model has no segmentation head.
        """
        _, features = self._decoder_features(z)
        return self.segmentation_head(features)

    @apply_forward_hook
    def classify(self, z: Tensor) -> Tensor:
        """Return the class logits of images, B N, from latents B C h w.

        Raises:
            ValueError: the model has no classification head.
        """
        if not self.config.num_classes:
            raise ValueError("this autoencoder has no classification head (`num_classes` is 0)")
        return self.classification_head(z)

    def autoencoder(self) -> AutoencoderKL:
        """Return the model without heads, for use in a diffusion pipeline; it shares the weights of this model.

        With `patch_size` 1 and no shortcut, it is a stock `AutoencoderKL`, which loads without this file.
        """
        own = self.config.patch_size > 1 or self.config.linear_shortcut
        if own and not (self.config.num_mask_classes or self.config.num_classes):
            return self
        model_class = MultiHeadAutoencoderKL if own else AutoencoderKL
        names = model_class._get_init_keys(model_class) - {"self"}
        arguments = {name: NO_HEADS[name] if name in NO_HEADS else self.config[name] for name in names}
        with torch.device("meta"):  # its weights are replaced at once, so none are initialized
            bare = model_class(**arguments)
        for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
            setattr(bare, name, getattr(self, name))
        return bare.train(self.training)

    @property
    def _decoder_body(self) -> nn.Module:
        return self.decoder.body if isinstance(self.decoder, WithShortcut) else self.decoder

    def _decoder_features(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder's input (B C h w) and its features before the last convolution (B channels H/p W/p).

        The parent class does not give access to these features, so the steps of its decoder's `forward` are repeated.
        """
        if not self.config.num_mask_classes:
            raise ValueError("this autoencoder has no segmentation head (`num_mask_classes` is 0)")
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        decoder = self._decoder_body
        sample = decoder.conv_in(z)
        for block in (decoder.mid_block, *decoder.up_blocks):
            if torch.is_grad_enabled() and decoder.gradient_checkpointing:
                sample = decoder._gradient_checkpointing_func(block, sample)
            else:
                sample = block(sample)
        return z, decoder.conv_act(decoder.conv_norm_out(sample))


def _class_names(
    number_name: str, number: int, names_name: str, names: Mapping[int | str, str] | None
) -> dict[str, str] | None:
    """Return `names` with their ids as strings; raise ValueError unless the ids are 0 to `number` - 1."""
    if number < 0 or number == 1:
        raise ValueError(f"`{number_name}` must be 0 (no head) or at least 2, but is {number}")
    by_id = {str(id_): str(name) for id_, name in (names or {}).items()}
    if by_id and set(by_id) != {str(id_) for id_ in range(number)}:
        raise ValueError(f"`{names_name}` must name the classes 0 to {number - 1}, but names {', '.join(by_id)}")
    return by_id or None
