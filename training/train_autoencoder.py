"""Train an autoencoder: image ⇄ latents.

    accelerate launch training/train_autoencoder.py                       # the quickstart's posters
    accelerate launch training/train_autoencoder.py --train_data_dir my_pictures --resolution 128 --output_dir runs/ae
    accelerate launch training/train_autoencoder.py --config configs/experiments/autoencoder/quickstart.yaml

Typed again, a command goes on where the run stood. images: B 3 H W in [-1, 1]; latents: B C h w.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.cli import UserError, entry_point
from training.data import DataConfig, ImageDataset, load_split, validate_data_config
from training.data_checks import require_clean
from training.discriminator import PatchDiscriminator
from training.evaluation.images import psnr, ssim, to_pil
from training.loop import train
from training.objectives import gaussian_kl, hinge_discriminator_loss, hinge_generator_loss
from training.parsing import parse_config
from training.perceptual import PerceptualLoss
from training.previews import Previews
from training.run_config import RunConfig, check_at_least, option
from training.run_folder import has_checkpoint
from training.sampler import Draws, SampleKey
from training.sizes import check_deepest_feature_map
from training.stage import Batch, Phase, Stage
from training.validation import fetch
from training.weights import load_initial_weights

logger = logging.getLogger("halftone")

PRESET = "configs/experiments/autoencoder/quickstart.yaml"
PREVIEWS = 8
STATISTICS_BATCH = 32
INITIAL_LOGVAR = -6.0
PRINCIPAL_COMPONENTS_IMAGES = 512
BODY_START = 0.1


@dataclass
class AutoencoderModelConfig:
    """The network; names are those of the Diffusers classes."""

    class_name: Literal["MultiHeadAutoencoderKL", "AutoencoderKL", "AutoencoderTiny"] = "MultiHeadAutoencoderKL"
    """MultiHeadAutoencoderKL (may work on pixel patches), AutoencoderKL or AutoencoderTiny"""
    block_out_channels: list[int] = field(default_factory=lambda: [96, 128])
    """Channels per resolution; each after the first halves it"""
    latent_channels: int = 16
    """Channels of the latents"""
    layers_per_block: int = 1
    """Residual blocks per resolution"""
    patch_size: int = 4
    """Side of the pixel patches the network works on (MultiHeadAutoencoderKL); 1 is the stock layout"""
    linear_shortcut: bool = True
    """A linear map beside encoder and decoder (MultiHeadAutoencoderKL); learns much faster"""
    norm_num_groups: int = 32
    """Groups of the group normalization"""
    mid_block_add_attention: bool = False
    """Self-attention in the middle, at the lowest resolution"""


@dataclass
class Config(RunConfig, DataConfig):
    """Flags of train_autoencoder.py."""

    output_dir: str = option("runs/autoencoder", on_resume="free")
    """The run folder"""
    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig, metadata={"on_resume": "error"})
    """The autoencoder"""
    l1_weight: float = option(1.0)
    """Weight of the mean absolute error"""
    l2_weight: float = option(0.0)
    """Weight of the mean squared error"""
    kl_weight: float = option(1e-6)
    """Weight of the posterior's KL divergence to a standard normal; for classes that have a posterior"""
    latent_noise: float = option(0.0)
    """Noise added to the latents before decoding, relative to their own deviation; a decoder that forgives errors"""
    perceptual_weight: float = option(0.0)
    """Weight of the perceptual loss"""
    perceptual_backbone: str | None = option(None)
    """Vision backbone of Transformers, by name or folder, e.g. microsoft/resnet-18"""
    adversarial_weight: float = option(0.0)
    """Weight of the patch discriminator; 0 trains without one"""
    discriminator_start: int = option(1000)
    """The step from which the discriminator trains and counts"""
    discriminator_learning_rate: float | None = option(None)
    """Unset: that of the autoencoder"""
    init_from: str | None = option(None)
    """Start from the weights of a run, checkpoint or pipeline; steps and optimizer start anew"""
    latent_statistics_images: int = option(4096)
    """Images over which the latents' mean and deviation are measured at the end"""

    def validate(self) -> None:
        super().validate()
        validate_data_config(self)
        for name in ("l1_weight", "l2_weight", "kl_weight", "latent_noise", "perceptual_weight", "adversarial_weight"):
            check_at_least(name, getattr(self, name), 0)
        if not (self.l1_weight or self.l2_weight or self.perceptual_weight):
            raise UserError(
                "nothing to learn from: one of --l1_weight, --l2_weight, --perceptual_weight must be above 0"
            )
        if self.perceptual_weight and not self.perceptual_backbone:
            raise UserError("--perceptual_weight needs --perceptual_backbone, e.g. microsoft/resnet-18")
        model = self.model
        if not model.block_out_channels or min(model.block_out_channels) < 1:
            raise UserError(
                f"--model.block_out_channels is {model.block_out_channels}; "
                "give a number per resolution, e.g. '[96,128]'"
            )
        for name in ("latent_channels", "layers_per_block", "patch_size", "norm_num_groups"):
            check_at_least(f"model.{name}", getattr(model, name), 1)
        if model.patch_size != 1 and model.class_name != "MultiHeadAutoencoderKL":
            raise UserError(
                f"--model.patch_size {model.patch_size} is for MultiHeadAutoencoderKL; "
                f"set it to 1 for {model.class_name}"
            )
        if any(width % model.norm_num_groups for width in model.block_out_channels):
            raise UserError(
                f"--model.block_out_channels {model.block_out_channels} must be multiples of "
                f"--model.norm_num_groups {model.norm_num_groups}"
            )
        levels = len(model.block_out_channels)
        check_deepest_feature_map(self.resolution, model.patch_size, levels, "--model.block_out_channels")


def build_autoencoder(config: AutoencoderModelConfig, resolution: int) -> torch.nn.Module:
    """A Diffusers autoencoder with fresh weights."""
    import diffusers

    from pipelines.multi_head_autoencoder import MultiHeadAutoencoderKL

    widths, levels = tuple(config.block_out_channels), len(config.block_out_channels)
    if config.class_name == "AutoencoderTiny":
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths[::-1],
            num_encoder_blocks=(config.layers_per_block,) * levels,
            num_decoder_blocks=(config.layers_per_block,) * levels,
            latent_channels=config.latent_channels,
        )
    arguments = {
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
    return narrow_posterior(
        MultiHeadAutoencoderKL(**arguments, patch_size=config.patch_size, linear_shortcut=config.linear_shortcut)
    )


@torch.no_grad()
def narrow_posterior(autoencoder: Any) -> Any:
    """Start with a posterior of deviation 0.05: at 1, where fresh weights put it, noise drowns the first latents."""
    channels = autoencoder.config.latent_channels
    autoencoder.quant_conv.weight[channels:] *= 0.1
    autoencoder.quant_conv.bias[channels:] = INITIAL_LOGVAR
    return autoencoder


@torch.no_grad()
def start_from_principal_components(autoencoder: Any, images: Tensor) -> None:
    """Make the linear shortcuts the best linear autoencoder of `images` (N 3 H W), in closed form.

    Latents are then the principal components of patches, rotated at random: all channels have about the same
    variance, while directions that matter more to the eye keep more of it, and a diffusion model decides them first,
    as it does with pixels. The networks beside the shortcuts start small and learn the rest. Nothing changes for a
    model without shortcuts.
    """
    if not getattr(autoencoder.config, "linear_shortcut", False):
        return
    factor, channels, colors = (
        autoencoder.spatial_compression_ratio,
        autoencoder.config.latent_channels,
        images.shape[1],
    )
    patches = F.pixel_unshuffle(images, factor).movedim(1, -1).flatten(0, -2).double()
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))  # ascending
    variances, directions = variances.flip(0)[:channels].clamp(min=1e-8), directions.flip(1)[:, :channels].T
    scale = variances.mean().sqrt()  # one for all: whitened, a detail would count as much as the page's colour
    rotation, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    into, out_of = autoencoder.encoder.shortcut, autoencoder.decoder.shortcut
    analysis, synthesis = rotation @ directions / scale, rotation @ directions * scale
    into.weight.zero_()
    into.bias.zero_()
    into.weight[:channels] = analysis.reshape(channels, colors, factor, factor).to(into.weight)
    into.bias[:channels] = -(analysis @ mean).to(into.bias)
    out_of.weight.copy_(synthesis.reshape(channels, colors, factor, factor))
    # A transposed convolution has one bias per colour, not one per pixel of the patch.
    out_of.bias.copy_(mean.reshape(colors, -1).mean(1))
    autoencoder.quant_conv.weight[:channels] = torch.eye(2 * channels)[:channels, :, None, None]
    autoencoder.quant_conv.bias[:channels] = 0
    autoencoder.post_quant_conv.weight.copy_(torch.eye(channels)[:, :, None, None])
    autoencoder.post_quant_conv.bias.zero_()
    for body in (autoencoder.encoder.body, autoencoder.decoder.body):
        last = [module for module in body.modules() if isinstance(module, torch.nn.Conv2d)][-1]
        last.weight *= BODY_START
        last.bias *= BODY_START


class AutoencoderPhase(Phase):
    """Reconstruction, KL, and what a perceptual backbone and a discriminator add."""

    name = "autoencoder"

    def __init__(self, autoencoder: torch.nn.Module, config: Config, perceptual: PerceptualLoss | None):
        super().__init__()
        self.autoencoder = autoencoder
        self.config = config
        if perceptual is not None:
            self.borrow(perceptual=perceptual)

    def reconstruct(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """The reconstruction, and the KL per sample (None for a class without a posterior)."""
        encoded = self.autoencoder.encode(images)
        if hasattr(encoded, "latent_dist"):
            mean, logvar = encoded.latent_dist.mean, encoded.latent_dist.logvar
            noise = draws.normal("posterior", mean.shape[1:]).to(mean.dtype)
            latents, kl = mean + torch.exp(0.5 * logvar) * noise, gaussian_kl(mean.float(), logvar.float())
        else:
            latents, kl = encoded.latents, None
        if self.config.latent_noise:
            # Relative: from noise of a fixed size the encoder escapes by making its latents larger.
            spread = latents.detach().float().std(dim=(1, 2, 3), keepdim=True)
            latents = latents + self.config.latent_noise * spread * draws.normal("latent_noise", latents.shape[1:])
        return self.autoencoder.decode(latents).sample, kl

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config, images = self.config, batch["pixel_values"]
        reconstruction, kl = self.reconstruct(images, draws)
        error = reconstruction - images
        metrics = {"l1": error.abs().mean()}
        loss = config.l1_weight * metrics["l1"] + config.l2_weight * error.square().mean()
        if kl is not None:
            metrics["kl"] = kl.mean()
            loss = loss + config.kl_weight * metrics["kl"]
        if config.perceptual_weight:
            metrics["perceptual"] = self.perceptual(reconstruction, images)
            loss = loss + config.perceptual_weight * metrics["perceptual"]
        if config.adversarial_weight and int(draws.step) >= config.discriminator_start:
            with untrained(self.discriminator):
                metrics["adversarial"] = hinge_generator_loss(self.discriminator(reconstruction))
            loss = loss + config.adversarial_weight * metrics["adversarial"]
        return loss, {name: value.detach() for name, value in metrics.items()}


@contextmanager
def untrained(module: torch.nn.Module) -> Iterator[None]:
    """Gradients flow through `module` inside, but not to its parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class DiscriminatorPhase(Phase):
    """Tells pictures from reconstructions; the autoencoder gets nothing from it but its own phase's term."""

    name = "discriminator"

    def __init__(self, discriminator: PatchDiscriminator, reconstruct, config: Config):
        super().__init__()
        self.discriminator = discriminator
        self.config = config
        self.learning_rate = config.discriminator_learning_rate
        self._reconstruct = reconstruct

    def active(self, step: int) -> bool:
        return step >= self.config.discriminator_start

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake, _ = self._reconstruct(batch["pixel_values"], draws)
        real_score, fake_score = self.discriminator(batch["pixel_values"]), self.discriminator(fake)
        loss = hinge_discriminator_loss(real_score, fake_score)
        return loss, {"real": real_score.detach().mean(), "fake": fake_score.detach().mean()}


class AutoencoderStage(Stage):
    name = "autoencoder"
    card_template = "autoencoder.md.jinja"
    best_metric, best_is_lower = "val_psnr", False

    def __init__(self, config: Config):
        self.config = config
        self._train = ImageDataset(load_split(config, "train", config.seed), config, captions=False)
        validation = load_split(config, "validation", config.seed)
        self._validation = ImageDataset(validation, config, captions=False, augment=False) if len(validation) else None
        require_clean(self._train, tell=logger.info)
        if self._validation is not None:
            require_clean(self._validation, tell=logger.info)
        torch.manual_seed(config.seed)
        self.autoencoder = build_autoencoder(config.model, config.resolution)
        some = [SampleKey(i, 0) for i in range(min(PRINCIPAL_COMPONENTS_IMAGES, len(self._train)))]
        start_from_principal_components(self.autoencoder, fetch(self._train, some)["pixel_values"])
        if config.init_from and not has_checkpoint(config.output_dir):
            load_initial_weights(config.init_from, {"vae": self.autoencoder})
        perceptual = PerceptualLoss(config.perceptual_backbone) if config.perceptual_weight else None  # type: ignore[arg-type]
        self.generator = AutoencoderPhase(self.autoencoder, config, perceptual)
        self.phases = [self.generator]
        self.frozen = [perceptual] if perceptual else []
        if config.adversarial_weight:
            discriminator = PatchDiscriminator()
            self.generator.borrow(discriminator=discriminator)
            self.phases.append(DiscriminatorPhase(discriminator, self.generator.reconstruct, config))
        self.ema_of = {"vae": self.autoencoder}  # as the pipeline calls it

    def train_data(self) -> ImageDataset:
        return self._train

    def validation_data(self) -> ImageDataset | None:
        return self._validation

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        images = batch["pixel_values"]
        reconstruction = self._reconstruct(images)
        return {
            "l1": (reconstruction - images).abs().flatten(1).mean(1).sum(),
            "psnr": psnr(reconstruction, images).sum(),
            "ssim": ssim(reconstruction, images).sum(),
            "count": torch.tensor(len(images)),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        names = {"val_loss": "l1", "val_psnr": "psnr", "val_ssim": "ssim"}
        return {name: sums[key] / sums["count"] for name, key in names.items()}

    def previews(self) -> Previews:
        data = self._validation or self._train
        rows = [SampleKey(i, 0) for i in range(min(PREVIEWS, len(data)))]
        images = fetch(data, rows)["pixel_values"].to(self._device)
        reconstruction = self._reconstruct(images)
        decibels = psnr(reconstruction, images).tolist()
        pairs = [image for pair in zip(images, reconstruction, strict=True) for image in pair]
        captions = [text for value in decibels for text in ("original", f"reconstruction, {value:.1f} dB")]
        return Previews([to_pil(image) for image in pairs], captions, columns=4)

    @torch.no_grad()
    def finish(self) -> None:
        """Measure the latents' mean and standard deviation per channel and write them into the model's config."""
        from pipelines.latents import write_latent_statistics

        count = 0
        total = squares = torch.zeros(1, dtype=torch.float64)
        rows = min(len(self._train), self.config.latent_statistics_images)
        for start in range(0, rows, STATISTICS_BATCH):
            self.poll()
            keys = [SampleKey(i, 0) for i in range(start, min(start + STATISTICS_BATCH, rows))]
            encoded = self.autoencoder.encode(fetch(self._train, keys)["pixel_values"].to(self._device))
            latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
            values = latents.cpu().double().movedim(1, 0).flatten(1)
            count += values.shape[1]
            total = total + values.sum(1)
            squares = squares + values.square().sum(1)
        mean = total / count
        std = (squares / count - mean**2).clamp(min=1e-12).sqrt()
        write_latent_statistics(self.autoencoder, mean.tolist(), std.tolist())

    def pipeline(self):
        from pipelines.autoencoder import AutoencoderPipeline

        strip = getattr(self.autoencoder, "autoencoder", None)
        return AutoencoderPipeline(vae=strip() if strip else self.autoencoder)

    @property
    def _device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    def _reconstruct(self, images: Tensor) -> Tensor:
        encoded = self.autoencoder.encode(images)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return self.autoencoder.decode(latents).sample


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(lambda: AutoencoderStage(config), config)


if __name__ == "__main__":
    entry_point(main)
