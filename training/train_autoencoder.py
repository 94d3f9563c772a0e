"""Train an autoencoder: image ⇄ latents, and what its heads read in them: masks and classes.

    accelerate launch training/train_autoencoder.py                       # the quickstart's posters
    accelerate launch training/train_autoencoder.py --train_data_dir my_pictures --resolution 128 --output_dir runs/ae
    accelerate launch training/train_autoencoder.py --config configs/experiments/autoencoder/posters_64_heads.yaml

Typed again, a command goes on where the run stood. images: B 3 H W in [-1, 1]; latents: B C h w.
B batch, K classes of pixels, N classes of pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.common.latents import sample_posterior
from pipelines.tools.cli import UserError, entry_point
from training.core.batches import fetch, to_device
from training.core.checks import check_at_least
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.run_config import RunConfig, option
from training.core.stage import Batch, Phase, Stage
from training.data.checks import require_clean
from training.data.images import DataConfig, ImageDataset, load_split, validate_data_config
from training.engine.loop import train
from training.engine.weights import load_initial_weights
from training.metrics.images import psnr, ssim, to_pil
from training.models.autoencoder import AutoencoderModelConfig, build_autoencoder, start_from_principal_components
from training.models.autoencoder_heads import Heads, HeadsConfig
from training.objectives.discriminator import PatchDiscriminator
from training.objectives.functional import gaussian_kl, hinge_discriminator_loss, hinge_generator_loss
from training.objectives.loss_weights import LearnedLossWeights
from training.objectives.perceptual import PerceptualLoss
from training.objectives.segmentation import segmentation_cross_entropy
from training.run.folder import has_checkpoint

logger = logging.getLogger("halftone")

PRESET = "configs/experiments/autoencoder/quickstart.yaml"
PREVIEWS = 8
STATISTICS_BATCH = 32
PRINCIPAL_COMPONENTS_IMAGES = 512
# What a learned weight takes as one loss of its own; the others keep the weights they are given.
RECONSTRUCTION = ("l1", "l2", "perceptual")
HEAD_LOSSES = ("segmentation", "classification")


@dataclass
class Config(RunConfig, DataConfig, HeadsConfig):
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
        self.model.check(self.resolution)
        self.validate_heads(self.model.class_name)


@dataclass
class Answers:
    """What an autoencoder says of latents.

    Args:
        images: B 3 H W.
        mask_logits: B K H W, and class_logits: B N; None without such a head.
    """

    images: Tensor
    mask_logits: Tensor | None = None
    class_logits: Tensor | None = None


def answers_of(autoencoder: Any, latents: Tensor) -> Answers:
    """Everything there is to be had from latents (B C h w), the decoder run once."""
    config = autoencoder.config
    class_logits = autoencoder.classify(latents) if config.get("num_classes") else None
    if not config.get("num_mask_classes"):
        return Answers(autoencoder.decode(latents).sample, None, class_logits)
    decoded = autoencoder.decode_with_masks(latents)
    return Answers(decoded.sample, decoded.mask_logits, class_logits)


class AutoencoderPhase(Phase):
    """Reconstruction, KL and heads, and what a perceptual backbone and a discriminator add."""

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
        """A draw from the posterior, with noise added, and the KL per sample (None for a class without a posterior)."""
        encoded = self.autoencoder.encode(images)
        if hasattr(encoded, "latent_dist"):
            mean, logvar = encoded.latent_dist.mean, encoded.latent_dist.logvar
            noise = draws.normal("posterior", mean.shape[1:]).to(mean.dtype)
            latents, kl = sample_posterior(mean, logvar, noise), gaussian_kl(mean.float(), logvar.float())
        else:
            latents, kl = encoded.latents, None
        if self.config.latent_noise:
            # Relative: from noise of a fixed size the encoder escapes by making its latents larger.
            spread = latents.detach().float().std(dim=(1, 2, 3), keepdim=True)
            latents = latents + self.config.latent_noise * spread * draws.normal("latent_noise", latents.shape[1:])
        return latents, kl

    def reconstruct(self, images: Tensor, draws: Draws) -> Tensor:
        """B 3 H W, as it is trained."""
        return self.autoencoder.decode(self.latents(images, draws)[0]).sample

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.losses(batch, draws)
        loss = self.weighted_sum(losses)
        metrics = {name: value.detach() for name, value in losses.items()}
        if self.loss_weights is not None:
            metrics |= {f"weight_{name}": value for name, value in self.loss_weights.weights().items()}
        return loss, metrics

    def losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Every loss that counts, before weighting: scalars by name."""
        config, images = self.config, batch["pixel_values"]
        latents, kl = self.latents(images, draws)
        answers = answers_of(self.autoencoder, latents)
        error = answers.images - images
        losses = {"l1": error.abs().mean()}
        if config.l2_weight:
            losses["l2"] = error.square().mean()
        if kl is not None:
            losses["kl"] = kl.mean()
        if config.perceptual_weight:
            losses["perceptual"] = self.perceptual(answers.images, images)
        if config.adversarial_weight and int(draws.step) >= config.discriminator_start:
            with untrained(self.discriminator):
                losses["adversarial"] = hinge_generator_loss(self.discriminator(answers.images))
        if answers.mask_logits is not None:
            losses["segmentation"] = segmentation_cross_entropy(answers.mask_logits, batch["mask"])
        if answers.class_logits is not None:
            losses["classification"] = F.cross_entropy(answers.class_logits.float(), batch["label"])
        return losses

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """What is minimized: each loss by the flag of its name, or by what has been learned."""
        weighted = {name: getattr(self.config, f"{name}_weight") * value for name, value in losses.items()}
        if self.loss_weights is None:
            return torch.stack(list(weighted.values())).sum()
        tasks = {"reconstruction": torch.stack([weighted.pop(n) for n in RECONSTRUCTION if n in weighted]).sum()}
        tasks |= {name: losses[name] for name in HEAD_LOSSES if name in losses}
        fixed = [value for name, value in weighted.items() if name not in tasks]
        return torch.stack([self.loss_weights(tasks), *fixed]).sum()


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

    def first_step(self, total_steps: int) -> int:
        return self.config.discriminator_start

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self._reconstruct(batch["pixel_values"], draws)
        real_score, fake_score = self.discriminator(batch["pixel_values"]), self.discriminator(fake)
        loss = hinge_discriminator_loss(real_score, fake_score)
        return loss, {"real": real_score.detach().mean(), "fake": fake_score.detach().mean()}


class AutoencoderStage(Stage):
    name = "autoencoder"
    card_template = "autoencoder.md.jinja"
    best_metric, best_is_lower = "val_psnr", False

    def __init__(self, config: Config):
        self.config = config
        self.heads = Heads.of(config)
        columns = {"captions": False, **self.heads.data_arguments()}
        self._train = ImageDataset(load_split(config, "train", config.seed), config, **columns)
        held_out = load_split(config, "validation", config.seed)
        self._validation = ImageDataset(held_out, config, augment=False, **columns) if len(held_out) else None
        for data in filter(None, (self._train, self._validation)):
            require_clean(data, tell=logger.info)
        torch.manual_seed(config.seed)
        self.autoencoder = build_autoencoder(config.model, config.resolution, **self.heads.model_arguments())
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
        found = self._answers(images)
        return {
            "l1": (found.images - images).abs().flatten(1).mean(1).sum(),
            "psnr": psnr(found.images, images).sum(),
            "ssim": ssim(found.images, images).sum(),
            "count": torch.tensor(len(images)),
            **self.heads.sums(batch, found.mask_logits, found.class_logits),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        names = {"val_loss": "l1", "val_psnr": "psnr", "val_ssim": "ssim"}
        return {name: sums[key] / sums["count"] for name, key in names.items()} | self.heads.metrics(sums)

    def previews(self) -> Previews:
        data = self._validation or self._train
        rows = [SampleKey(i, 0) for i in range(min(PREVIEWS, len(data)))]
        batch = to_device(fetch(data, rows), self._device)
        images = batch["pixel_values"]
        found = self._answers(images)
        decibels = psnr(found.images, images).tolist()
        words = self.heads.class_words(batch, found.class_logits)
        masks = self.heads.mask_cells(batch, found.mask_logits)
        cells = []
        for row in range(len(images)):
            true, read = words[row]
            cells.append((to_pil(images[row]), f"original{true}"))
            cells.append((to_pil(found.images[row]), f"reconstruction, {decibels[row]:.1f} dB{read}"))
            cells += masks[row]
        cells += self.heads.legend(images.shape[-1])
        return Previews([picture for picture, _ in cells], [caption for _, caption in cells], columns=4)

    @torch.no_grad()
    def finish(self) -> None:
        """Measure the latents' mean and standard deviation per channel and write them into the model's config."""
        from pipelines.common.latents import write_latent_statistics

        count = 0
        total = squares = torch.zeros(1, dtype=torch.float64)
        rows = min(len(self._train), self.config.latent_statistics_images)
        for start in range(0, rows, STATISTICS_BATCH):
            self.poll()
            keys = [SampleKey(i, 0) for i in range(start, min(start + STATISTICS_BATCH, rows))]
            latents = latents_of(self.autoencoder.encode(fetch(self._train, keys)["pixel_values"].to(self._device)))
            values = latents.cpu().double().movedim(1, 0).flatten(1)
            count += values.shape[1]
            total = total + values.sum(1)
            squares = squares + values.square().sum(1)
        mean = total / count
        std = (squares / count - mean**2).clamp(min=1e-12).sqrt()
        write_latent_statistics(self.autoencoder, mean.tolist(), std.tolist())

    def pipeline(self):
        from pipelines.autoencoder import AutoencoderPipeline

        vae: Any = self.autoencoder
        # Without heads it is a stock class wherever it can be; what a diffusion model takes of it never has heads.
        bare = hasattr(vae, "autoencoder") and not self.heads.model_arguments()
        return AutoencoderPipeline(vae=vae.autoencoder() if bare else vae)

    def card_facts(self) -> dict[str, Any]:
        return self.heads.card_facts()

    @property
    def _device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    def _answers(self, images: Tensor) -> Answers:
        """Of the posterior's mode."""
        encoded: Any = self.autoencoder.encode(images)  # type: ignore[operator]
        return answers_of(self.autoencoder, latents_of(encoded))


def latents_of(encoded: Any) -> Tensor:
    """What `encode` of any autoencoder gives, as latents B C h w: the posterior's mode, where there is a posterior."""
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(lambda: AutoencoderStage(config), config)


if __name__ == "__main__":
    entry_point(main)
