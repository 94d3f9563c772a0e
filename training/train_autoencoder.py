"""Train an autoencoder: image ⇄ latents, optionally with heads that predict masks and classes from the latents.

    accelerate launch training/train_autoencoder.py --train_data_dir my_images --resolution 128
    accelerate launch training/train_autoencoder.py                       # the quickstart's posters
    accelerate launch training/train_autoencoder.py --config configs/experiments/autoencoder/posters_64_heads.yaml

Run the same command again to resume the run.
"""

# Shapes: B batch, K classes of pixels, N classes of images. Images: B 3 H W (or 1, or 4) in [-1, 1]; latents: B C h w.

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.common.latents import sample_posterior
from pipelines.tools.cli import UserError, entry_point
from training.core.batches import fetch, uniform_batches
from training.core.draws import Draws, SampleKey
from training.core.exchange import Exchange
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, Phase, StageContext
from training.data.images import DataConfig, ImageDataset
from training.data.transforms import CHANNELS
from training.engine.session import train
from training.metrics.images import psnr, ssim
from training.models.autoencoder import (
    AutoencoderModelConfig,
    AutoencoderOutput,
    build_autoencoder,
    decode_all,
    latents_of,
    measure_latents,
    start_from_principal_components,
)
from training.models.autoencoder_heads import Heads, HeadsConfig
from training.objectives.discriminator import DiscriminatorPhase, PatchDiscriminator, parameters_fixed
from training.objectives.functional import gaussian_kl, halved, hinge_generator_loss
from training.objectives.loss_weights import LearnedLossWeights, weighted_sum
from training.objectives.perceptual import PerceptualLoss
from training.objectives.segmentation import segmentation_cross_entropy
from training.recipes.completion import complete_autoencoder
from training.recipes.options import RecipeConfig
from training.stages.class_names import recorded_class_names
from training.stages.image_stage import ImageStage, ImageStageConfig

PRESET = "configs/experiments/autoencoder/quickstart.yaml"
PREVIEWS = 8
PRINCIPAL_COMPONENTS_IMAGES = 512
SCALE_EQUIVARIANCE = "scale_equivariance_loss"
# With --learned_loss_weights, these losses share one learned weight and the loss of each head has its own; the other
# losses keep their configured weights.
RECONSTRUCTION = ("l1", "l2", "perceptual", SCALE_EQUIVARIANCE)


@dataclass
class Config(HeadsConfig, RecipeConfig, ImageStageConfig):
    """Flags of train_autoencoder.py."""

    image_modes = DataConfig.image_modes

    output_dir: str = option("runs/autoencoder", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    model: AutoencoderModelConfig = option(AutoencoderModelConfig)
    """The autoencoder"""
    l1_weight: float = option(1.0, on_resume="warn", at_least=0, essential=True)
    """Weight of the mean absolute error"""
    l2_weight: float = option(0.0, on_resume="warn", at_least=0, essential=True)
    """Weight of the mean squared error"""
    kl_weight: float = option(1e-6, on_resume="warn", at_least=0)
    """Weight of the KL divergence of the posterior from a standard normal; unused by classes without a posterior"""
    latent_noise: float = option(0.0, on_resume="warn", at_least=0)
    """Noise added to the latents before decoding, relative to their standard deviation; makes the decoder robust"""
    scale_equivariance: float = option(0.0, on_resume="warn", at_least=0)
    """Weight of the scale equivariance loss (Skorokhodov et al. 2025, arXiv 2502.14831): the reconstruction loss of
    images of half the side, decoded from latents of half the side; 0 disables it, 0.25 is a usual value"""
    perceptual_weight: float = option(0.0, on_resume="warn", at_least=0, essential=True)
    """Weight of the perceptual loss, which needs --perceptual_backbone; 0 disables it"""
    perceptual_backbone: str | None = option(None, on_resume="warn")
    """Transformers vision backbone of the perceptual loss: a Hub id such as microsoft/resnet-18, or a folder"""
    adversarial_weight: float = option(0.0, on_resume="warn", at_least=0, essential=True)
    """Weight of the adversarial loss of a patch discriminator; 0 trains without a discriminator"""
    discriminator_start: int = option(1000, on_resume="warn", at_least=0)
    """First step at which the discriminator trains and the adversarial loss is added"""
    discriminator_learning_rate: float | None = option(None, on_resume="warn", above=0)
    """Peak learning rate of the discriminator; if unset, --learning_rate is used"""
    latent_statistics_images: int = option(4096, on_resume="warn", at_least=1)
    """Number of images from which the latents' mean and standard deviation are computed at the end of training"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not (self.l1_weight or self.l2_weight or self.perceptual_weight):
            raise UserError(
                "nothing to learn from: one of --l1_weight, --l2_weight, --perceptual_weight must be above 0"
            )
        if self.perceptual_weight and not self.perceptual_backbone:
            raise UserError("--perceptual_weight needs --perceptual_backbone, e.g. microsoft/resnet-18")
        if self.perceptual_weight and self.image_mode != "rgb":
            raise UserError(
                f"--perceptual_weight {self.perceptual_weight:g} compares colour images, but --image_mode is "
                f"{self.image_mode}; set --perceptual_weight 0, or leave out --image_mode"
            )
        self.model.check_resolution(self.resolution)
        if self.scale_equivariance:
            self.model.check_halved_latents(self.resolution, "--scale_equivariance")
        self.check_heads(self.model.class_name)


class AutoencoderPhase(Phase):
    """Loss of the autoencoder: reconstruction, KL divergence and heads; optionally perceptual and adversarial loss."""

    name = "autoencoder"

    def __init__(self, autoencoder: torch.nn.Module, config: Config, perceptual: PerceptualLoss | None):
        super().__init__()
        self.autoencoder = autoencoder
        self.config = config
        self.loss_weights = None
        if config.learned_loss_weights:
            start = {"reconstruction": 1.0} | {head: getattr(config, f"{head}_weight") for head in config.heads}
            self.loss_weights = LearnedLossWeights(start, regression=("reconstruction",))
        if perceptual is not None:
            self.borrow(perceptual=perceptual)

    def latents(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Sample latents from the posterior and add noise to them.

        Returns:
            The latents, and the KL divergence of each sample (None for a class without a posterior).
        """
        encoded = self.autoencoder.encode(images)
        if hasattr(encoded, "latent_dist"):
            mean, logvar = encoded.latent_dist.mean, encoded.latent_dist.logvar
            noise = draws.normal("posterior", mean.shape[1:]).to(mean.dtype)
            latents, kl = sample_posterior(mean, logvar, noise), gaussian_kl(mean.float(), logvar.float())
        else:
            latents, kl = encoded.latents, None
        if self.config.latent_noise:
            # Relative to the latents: the encoder would evade noise of a fixed size by making its latents larger.
            spread = latents.detach().float().std(dim=(1, 2, 3), keepdim=True)
            latents = latents + self.config.latent_noise * spread * draws.normal("latent_noise", latents.shape[1:])
        return latents, kl

    def reconstruct(self, images: Tensor, draws: Draws) -> Tensor:
        """Reconstruct images as in training, from a sample of the posterior. B 3 H W."""
        return self.autoencoder.decode(self.latents(images, draws)[0]).sample

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.losses(batch, draws)
        weights = {SCALE_EQUIVARIANCE: self.config.scale_equivariance}
        weights |= {name: getattr(self.config, f"{name}_weight") for name in losses if name not in weights}
        loss = weighted_sum(losses, weights, self.loss_weights, {"reconstruction": RECONSTRUCTION})
        metrics = {name: value.detach() for name, value in losses.items()}
        if self.loss_weights is not None:
            metrics |= {f"weight_{name}": value for name, value in self.loss_weights.weights().items()}
        return loss, metrics

    def losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Compute the losses that are in use, before weighting: scalars by name."""
        config, images = self.config, batch["pixel_values"]
        latents, kl = self.latents(images, draws)
        decoded = decode_all(self.autoencoder, latents)
        losses = self.pixel_losses(decoded.images, images)
        if kl is not None:
            losses["kl"] = kl.mean()
        if config.perceptual_weight:
            losses["perceptual"] = self.perceptual(decoded.images, images)
        if config.adversarial_weight and int(draws.step) >= config.discriminator_start:
            with parameters_fixed(self.discriminator):
                losses["adversarial"] = hinge_generator_loss(self.discriminator(decoded.images))
        if decoded.mask_logits is not None:
            losses["segmentation"] = segmentation_cross_entropy(decoded.mask_logits, batch["mask"])
        if decoded.class_logits is not None:
            losses["classification"] = F.cross_entropy(decoded.class_logits.float(), batch["label"])
        if config.scale_equivariance:
            losses[SCALE_EQUIVARIANCE] = self.scale_equivariance_loss(latents, images)
        return losses

    def pixel_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Compute the losses of pixels that are in use, before weighting: scalars by name."""
        error = decoded - images
        losses = {"l1": error.abs().mean()}
        if self.config.l2_weight:
            losses["l2"] = error.square().mean()
        return losses

    def scale_equivariance_loss(self, latents: Tensor, images: Tensor) -> Tensor:
        """Compute the loss by which latents of half the side decode to images of half the side, a scalar.

        It is the regularization of Skorokhodov et al. (2025), with a factor of 2. The distance of the images is the
        weighted sum of the pixel losses and the perceptual loss; heads and discriminator do not see smaller images.

        Args:
            latents: B C h w, as they are decoded for the other losses, so that the encoder runs once.
            images: B 3 H W.
        """
        references = halved(images)
        decoded = self.autoencoder.decode(halved(latents)).sample
        losses = self.pixel_losses(decoded, references)
        if self.config.perceptual_weight:
            losses["perceptual"] = self.perceptual(decoded, references)
        return weighted_sum(losses, {name: getattr(self.config, f"{name}_weight") for name in losses}, None, {})


class AutoencoderStage(ImageStage):
    name = "autoencoder"
    card_template = "autoencoder.md.jinja"
    best_metric, best_is_lower = "val_psnr", False
    takes_aspect_buckets = True

    def __init__(self, config: Config, context: StageContext):
        super().__init__(config, context)
        self.heads = Heads.of(config, recorded_class_names(config, context))
        columns = {"captions": False, **self.heads.data_arguments()}
        # Losses of half the side need latents with an even number of cells.
        divisor = config.model.downsampling * (2 if config.scale_equivariance else 1)
        self.open_data(functools.partial(ImageDataset, config=config, **columns), divisor)
        torch.manual_seed(config.seed)
        channels = CHANNELS[config.image_mode]
        heads = self.heads.model_arguments()
        self.autoencoder = build_autoencoder(config.model, config.resolution, channels, **heads)
        # The linear shortcuts start as the best linear autoencoder of these images; the networks learn the rest.
        some = range(min(PRINCIPAL_COMPONENTS_IMAGES, len(self.training_set)))
        batches = uniform_batches(self.training_set, some, len(some))
        images = (fetch(self.training_set, [SampleKey(i, 0) for i in rows])["pixel_values"] for rows in batches)
        start_from_principal_components(self.autoencoder, images)
        self.ema_of = {"vae": self.autoencoder}  # the name of this component in the pipeline
        self.take_initial_weights(self.ema_of)
        perceptual = PerceptualLoss(config.perceptual_backbone or "") if config.perceptual_weight else None
        self.generator = AutoencoderPhase(self.autoencoder, config, perceptual)
        self.phases = [self.generator]
        self.frozen = [perceptual] if perceptual else []
        if config.adversarial_weight:
            discriminator = PatchDiscriminator(image_channels=channels)
            self.generator.borrow(discriminator=discriminator)
            schedule = config.discriminator_start, config.discriminator_learning_rate
            self.phases.append(DiscriminatorPhase(discriminator, self.generator.reconstruct, *schedule))

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        images, decoded = batch["pixel_values"], self._decode_modes(batch)
        return {
            "l1": (decoded.images - images).abs().flatten(1).mean(1).sum(),
            "psnr": psnr(decoded.images, images).sum(),
            "ssim": ssim(decoded.images, images).sum(),
            "count": torch.tensor(len(images)),
            **self.heads.sums(batch, decoded.mask_logits, decoded.class_logits),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        names = {"val_loss": "l1", "val_psnr": "psnr", "val_ssim": "ssim"}
        return {name: sums[key] / sums["count"] for name, key in names.items()} | self.heads.metrics(sums)

    def previews(self, exchange: Exchange) -> Previews:
        def decode(batch: Batch, rows: Sequence[int]) -> list[tuple[Image.Image, str]]:
            return self.heads.preview_cells(batch, self._decode_modes(batch))

        cells = self.shown(exchange, decode, PREVIEWS)
        cells += self.heads.legend(cells[0][0].width)
        return Previews([image for image, _ in cells], [caption for _, caption in cells], columns=4)

    def finish(self, exchange: Exchange) -> None:
        """Measure the latents' mean and standard deviation per channel and write them into the model's config."""
        measure_latents(
            self.autoencoder,
            self.training_set.without_augmentation(),
            self.config.latent_statistics_images,
            self.context.device,
            self.context.poll,
            exchange,
        )

    def pipeline(self):
        from pipelines.autoencoder import AutoencoderPipeline

        vae: Any = self.autoencoder
        # Without heads, export a class of Diffusers itself where there is one, so that it loads without remote code.
        bare = hasattr(vae, "autoencoder") and not self.heads.model_arguments()
        return AutoencoderPipeline(vae=vae.autoencoder() if bare else vae)

    def card_facts(self) -> dict[str, Any]:
        return self.heads.card_facts()

    def _decode_modes(self, batch: Batch) -> AutoencoderOutput:
        """Decode the mode of each image's posterior."""
        encoded: Any = self.autoencoder.encode(batch["pixel_values"])
        return decode_all(self.autoencoder, latents_of(encoded))


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET, complete=complete_autoencoder)
    return train(AutoencoderStage, config)


if __name__ == "__main__":
    entry_point(main)
