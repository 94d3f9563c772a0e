"""Building, initializing and decoding with autoencoders, and measuring the statistics of their latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.tools.cli import UserError
from training.core.batches import fetch, uniform_batches
from training.core.checks import SMALLEST_MAP, check_deepest_feature_map, check_multiples
from training.core.draws import SampleKey
from training.core.exchange import ALONE, Exchange
from training.core.options import Options, option
from training.core.stage import MapDataset

INITIAL_LOGVAR = -6.0  # a standard deviation of about 0.05
BODY_START = 0.1  # factor on the last convolution of the networks beside the linear shortcuts
STATISTICS_BATCH = 32


@dataclass
class AutoencoderModelConfig(Options):
    """Architecture of the autoencoder; the names are those of the Diffusers classes."""

    class_name: Literal["MultiHeadAutoencoderKL", "AutoencoderKL", "AutoencoderTiny"] = option("MultiHeadAutoencoderKL")
    """Autoencoder class: MultiHeadAutoencoderKL (supports pixel patches and heads), AutoencoderKL or AutoencoderTiny"""
    block_out_channels: list[int] = option([96, 128])
    """Channels of each level; every level after the first halves the resolution"""
    latent_channels: int = option(16, at_least=1)
    """Number of latent channels"""
    layers_per_block: int = option(1, at_least=1)
    """Number of residual blocks per level"""
    patch_size: int = option(4, at_least=1)
    """Side of the pixel patches that the network works on (MultiHeadAutoencoderKL only); 1 is the architecture of
    AutoencoderKL"""
    linear_shortcut: bool = option(True)
    """Add a linear map beside encoder and decoder (MultiHeadAutoencoderKL only); the model then learns much faster"""
    norm_num_groups: int = option(32, at_least=1)
    """Number of groups for group normalization"""
    mid_block_add_attention: bool = option(False)
    """Use self-attention in the middle block, which has the lowest resolution"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.patch_size != 1 and self.class_name != "MultiHeadAutoencoderKL":
            raise UserError(
                f"--{prefix}patch_size {self.patch_size} works only with MultiHeadAutoencoderKL; "
                f"set it to 1 for {self.class_name}"
            )
        check_multiples(
            f"{prefix}block_out_channels", self.block_out_channels, f"{prefix}norm_num_groups", self.norm_num_groups
        )

    def check_resolution(self, resolution: int) -> None:
        """Raise UserError if the network cannot work on images of `resolution` pixels."""
        check_deepest_feature_map(
            resolution, self.patch_size, len(self.block_out_channels), "--model.block_out_channels"
        )

    @property
    def downsampling(self) -> int:
        """Number of pixels per latent cell along a side."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)

    def check_halved_latents(self, resolution: int, flag: str) -> None:
        """Raise UserError for `flag` if latents of images of `resolution` pixels cannot be decoded at half size."""
        factor = self.downsampling
        side, least = resolution // factor, 2 * SMALLEST_MAP
        if side % 2 or side < least:
            raise UserError(
                f"{flag} decodes latents of half the side, but the latents are {side}×{side} "
                f"(--resolution {resolution}, downsampled by {factor}); their side must be even and at least {least}: "
                f"use --resolution {max(least, side + side % 2) * factor}, or set {flag} to 0"
            )


def build_autoencoder(
    config: AutoencoderModelConfig, resolution: int, image_channels: int = 3, **heads: Any
) -> torch.nn.Module:
    """Build a Diffusers autoencoder with new weights.

    Args:
        image_channels: 1 for grey images, 3 for RGB, 4 with alpha.
        heads: arguments of MultiHeadAutoencoderKL for its heads, such as `num_mask_classes`.
    """
    import diffusers

    from pipelines.models.multi_head_autoencoder import MultiHeadAutoencoderKL

    widths, levels = tuple(config.block_out_channels), len(config.block_out_channels)
    if config.class_name == "AutoencoderTiny":
        return diffusers.AutoencoderTiny(
            in_channels=image_channels,
            out_channels=image_channels,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths[::-1],
            num_encoder_blocks=(config.layers_per_block,) * levels,
            num_decoder_blocks=(config.layers_per_block,) * levels,
            latent_channels=config.latent_channels,
        )
    arguments = {
        "in_channels": image_channels,
        "out_channels": image_channels,
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_add_attention": config.mid_block_add_attention,
        "sample_size": resolution,
        "force_upcast": False,
        "scaling_factor": 1.0,
    }
    if config.class_name == "AutoencoderKL":
        return narrow_posterior(diffusers.AutoencoderKL(**arguments))
    own = {"patch_size": config.patch_size, "linear_shortcut": config.linear_shortcut}
    return narrow_posterior(MultiHeadAutoencoderKL(**arguments, **own, **heads))


@torch.no_grad()
def narrow_posterior(autoencoder: Any) -> Any:
    """Initialize the posterior's standard deviation to about 0.05, and return the autoencoder.

    With Diffusers' initialization it is about 1, and noise of that size drowns the latents of an untrained encoder.
    """
    channels = autoencoder.config.latent_channels
    # The first half of these outputs is the mean, the second half the log-variance.
    autoencoder.quant_conv.weight[channels:] *= 0.1
    autoencoder.quant_conv.bias[channels:] = INITIAL_LOGVAR
    return autoencoder


@torch.no_grad()
def start_from_principal_components(autoencoder: Any, batches: Iterable[Tensor]) -> None:
    """Initialize the linear shortcuts to the best linear autoencoder of some images, in closed form.

    This saves training: 21.3 dB after 150 steps of 8 images were measured, against 17.9 dB after 300 steps with
    shortcuts that start as usual. The networks beside the shortcuts start small and learn the rest.

    The latents start as the principal components of image patches under a random rotation. All channels have about
    the same variance, but each component keeps its own, so that a diffusion model learns the components with large
    variance first, as it does with pixels. A model without shortcuts is left unchanged.

    Args:
        batches: images in batches of any sizes, N C H W each.
    """
    if not getattr(autoencoder.config, "linear_shortcut", False):
        return
    factor, channels = autoencoder.spatial_compression_ratio, autoencoder.config.latent_channels
    colors = autoencoder.config.in_channels
    patches = torch.cat(
        [F.pixel_unshuffle(images, factor).movedim(1, -1).flatten(0, -2).double() for images in batches]
    )
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))  # in ascending order
    variances, directions = variances.flip(0)[:channels].clamp(min=1e-8), directions.flip(1)[:, :channels].T
    # One scale for all components. Whitened components were tried: a small detail then counts as much as the colour
    # of the page, and the diffusion model learns more slowly.
    scale = variances.mean().sqrt()
    # Without the rotation, each channel would be one component, and scaling the latents channel by channel for the
    # diffusion model would whiten them after all.
    rotation, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    into, out_of = autoencoder.encoder.shortcut, autoencoder.decoder.shortcut
    analysis, synthesis = rotation @ directions / scale, rotation @ directions * scale
    # The shortcut gives the posterior's mean; it adds nothing to the log-variance.
    into.weight.zero_()
    into.bias.zero_()
    into.weight[:channels] = analysis.reshape(channels, colors, factor, factor).to(into.weight)
    into.bias[:channels] = -(analysis @ mean).to(into.bias)
    out_of.weight.copy_(synthesis.reshape(channels, colors, factor, factor))
    # A transposed convolution has one bias per colour, not one per pixel of the patch.
    out_of.bias.copy_(mean.reshape(colors, -1).mean(1))
    # The 1×1 convolutions around the latents start as the identity, so that the closed-form solution passes through
    # them. The log-variance keeps the start that `narrow_posterior` gave it.
    autoencoder.quant_conv.weight[:channels] = torch.eye(2 * channels)[:channels, :, None, None]
    autoencoder.quant_conv.bias[:channels] = 0
    autoencoder.post_quant_conv.weight.copy_(torch.eye(channels)[:, :, None, None])
    autoencoder.post_quant_conv.bias.zero_()
    # The untrained networks would add noise to this solution, so their outputs start small, but not at 0: all their
    # layers get gradients from the first step on.
    for body in (autoencoder.encoder.body, autoencoder.decoder.body):
        last = [module for module in body.modules() if isinstance(module, torch.nn.Conv2d)][-1]
        last.weight *= BODY_START
        last.bias *= BODY_START


@dataclass
class AutoencoderOutput:
    """Reconstruction and head outputs for a batch of latents.

    Args:
        images: B 3 H W.
        mask_logits: B K H W; None without a segmentation head.
        class_logits: B N; None without a classification head.
    """

    images: Tensor
    mask_logits: Tensor | None = None
    class_logits: Tensor | None = None


def decode_all(autoencoder: Any, latents: Tensor) -> AutoencoderOutput:
    """Decode latents (B C h w) to images and the outputs of all heads; the decoder runs once."""
    config = autoencoder.config
    class_logits = autoencoder.classify(latents) if config.get("num_classes") else None
    if not config.get("num_mask_classes"):
        return AutoencoderOutput(autoencoder.decode(latents).sample, None, class_logits)
    decoded = autoencoder.decode_with_masks(latents)
    return AutoencoderOutput(decoded.sample, decoded.mask_logits, class_logits)


def latents_of(encoded: Any) -> Tensor:
    """Return the latents (B C h w) from an `encode` output of any autoencoder: the posterior's mode if it has one."""
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


@torch.no_grad()
def measure_latents(
    autoencoder: Any,
    data: MapDataset,
    num_images: int,
    device: torch.device,
    poll: Callable[[], None],
    exchange: Exchange = ALONE,
) -> None:
    """Measure the latents' mean and standard deviation per channel and write them into the model's config.

    Args:
        data: dataset whose first `num_images` rows are encoded.
        poll: called before each batch; it raises an exception when the run is asked to stop.
        exchange: the processes that divide the batches among them; all of them call this.
    """
    from pipelines.common.latents import write_latent_statistics

    batches = list(uniform_batches(data, range(min(len(data), num_images)), STATISTICS_BATCH))

    def sums(numbers: Sequence[int]) -> tuple[int, Tensor, Tensor]:
        poll()
        keys = [SampleKey(i, 0) for number in numbers for i in batches[number]]
        latents = latents_of(autoencoder.encode(fetch(data, keys)["pixel_values"].to(device)))
        values = latents.cpu().double().movedim(1, 0).flatten(1)
        return values.shape[1], values.sum(1), values.square().sum(1)

    count = 0
    total = squares = torch.zeros(1, dtype=torch.float64)
    for size, values, squared in exchange.map_batches(sums, len(batches), 1):  # in order: sums depend on it
        count, total, squares = count + size, total + values, squares + squared
    mean = total / count
    std = (squares / count - mean**2).clamp(min=1e-12).sqrt()
    write_latent_statistics(autoencoder, mean.tolist(), std.tolist())
