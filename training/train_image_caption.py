"""Train a joint model of images and captions: it captions images, draws captions, and generates new pairs of both.

    accelerate launch training/train_image_caption.py                     # the quickstart's generated posters
    accelerate launch training/train_image_caption.py --config configs/experiments/image_caption/emoji_64.yaml
    accelerate launch training/train_image_caption.py --train_data_dir my_images

The tokenizer is trained on the captions, unless --tokenizer names one. Run the same command again to resume the run.
"""

# Shapes: B pairs, D latent vector, L tokens.

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.commands import command_with
from training.core.draws import Draws
from training.core.exchange import Exchange
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, StageContext
from training.data.captions import (
    CaptionDataConfig,
    CaptionedImages,
    pixel_variance,
    tell_round_trips,
    tokenizer_for,
)
from training.data.fingerprints import tokenizer_fingerprint
from training.data.source import load_split
from training.data.tokenization import CaptionTokens
from training.engine.schedule import LR_SCHEDULERS
from training.engine.session import train
from training.metrics.images import psnr, ssim
from training.models.caption_previews import caption_previews
from training.models.image_caption import ImageCaptionModelConfig, build_model, model_summary
from training.models.image_caption_phase import ImageCaptionObjectiveConfig, ImageCaptionPhase
from training.models.latent_prior import LatentPriorConfig, LatentPriorPhase, build_latent_prior
from training.objectives.captions import same_captions, same_images, scaled_errors
from training.recipes.completion import complete_image_caption
from training.recipes.options import RecipeConfig
from training.stages.generating import GeneratingStage, RunEvaluationConfig
from training.stages.image_stage import ImageStageConfig, PreviewConfig

logger = logging.getLogger("halftone")

PRESET = "configs/experiments/image_caption/tiny.yaml"
VARIANCE_IMAGES = 256


@dataclass
class Config(
    ImageCaptionObjectiveConfig, PreviewConfig, RunEvaluationConfig, CaptionDataConfig, RecipeConfig, ImageStageConfig
):
    """Flags of train_image_caption.py."""

    output_dir: str = option("runs/image_caption", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    lr_scheduler: str = option("cosine", on_resume="warn", choices=LR_SCHEDULERS)
    """Learning-rate schedule: linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup or
    piecewise_constant"""
    model: ImageCaptionModelConfig = option(ImageCaptionModelConfig)
    """Encoders and decoders of images and captions"""
    prior: LatentPriorConfig = option(LatentPriorConfig)
    """The latent prior, which generates new pairs of image and caption"""
    preview_prompts: list[str] | None = option(None, on_resume="free", essential=True)
    """Captions for which the previews show generated images, e.g. '[a red heart,a smiling face]'; if unset, those of
    the first validation images"""
    num_previews: int = option(6, on_resume="free", at_least=1)
    """Number of images in a row of the previews"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        self.model.check_resolution(self.resolution)
        if not all(prompt.strip() for prompt in self.preview_prompts or []):
            raise UserError(f"--preview_prompts {self.preview_prompts} has an empty caption; remove it or fill it in")
        if self.alignment_weight and self.train_batch_size < 2:
            raise UserError(
                "--train_batch_size is 1, but the alignment loss compares a pair with the other pairs of its batch; "
                f"set --train_batch_size to 2 or more, or --alignment_weight {self.alignment_weight} to 0"
            )
        if self.alignment_weight and self.auto_batch_size:
            raise UserError(
                "--auto_batch_size true would change the alignment loss, which compares a pair with the other pairs of "
                f"its micro-batch; leave it out, or set --alignment_weight {self.alignment_weight} to 0"
            )


class ImageCaptionStage(GeneratingStage):
    name = "image caption"
    card_template = "image_caption.md.jinja"
    conditions = ("captions",)

    def __init__(self, config: Config, context: StageContext):
        super().__init__(config, context)
        weights, max_length = self._weights(), config.model.max_length
        rows, held_out = (load_split(config, split, config.seed) for split in ("train", "validation"))
        self.tokenizer = tokenizer_for(config, rows, max_length, weights, held_out)
        tokens = CaptionTokens(self.tokenizer, max_length, padding="longest")
        self.open_data(functools.partial(CaptionedImages, config=config, caption_tokens=tokens))
        shown, which = self.shown_data, "validation" if self.validation_set else "training"
        may_change = weights is None and not config.tokenizer
        captioned = shown.captioned, self.training_set.captioned
        tell_round_trips(self.tokenizer, config, *captioned, which, may_change=may_change)
        self.aspect_ratio = self.training_set.aspect_ratio()
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, config.resolution, self.tokenizer)
        self.phase = ImageCaptionPhase(self.model, config, pixel_variance(self.training_set, VARIANCE_IMAGES))
        self.phases, self.ema_of = [self.phase], {"model": self.model}
        # Weights saved before `--prior.start` have no prior: a run that starts from them initializes a new one.
        no_prior = weights is not None and not (weights / "prior").is_dir()
        self.prior = None
        if config.prior.hidden_size and not (no_prior and config.validate_model):
            self.prior = build_latent_prior(config.prior, config.model.latent_size)
            self.prior_phase = LatentPriorPhase(self.prior, config.prior, self.phase.image_latents)
            self.phases, self.ema_of = [self.phase, self.prior_phase], {"model": self.model, "prior": self.prior}
        self.take_initial_weights({"model": self.model} if no_prior else self.ema_of)
        logger.info("%s", model_summary(self.ema_of))

    def _weights(self) -> Path | None:
        """Return the pipeline folder of the weights that the run starts from; None if it starts from scratch."""
        from pipelines.tools.loading import find_pipeline

        config = self.config
        if config.validate_model:
            return find_pipeline(config.validate_model)
        if self.context.resuming:
            return find_pipeline(config.output_dir, "latest")
        return find_pipeline(config.init_from) if config.init_from else None

    def inputs(self) -> dict[str, str]:
        return {**super().inputs(), "tokenizer": tokenizer_fingerprint(self.tokenizer)}

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Compute losses and metrics from the posterior means; images and captions are each decoded from both means."""
        phase, pixels, share = self.phase, batch["pixel_values"], self.config.cross_share
        ids, mask = batch["input_ids"], batch["attention_mask"]
        image, caption = (posterior.mean for posterior in phase.posteriors(batch, ids, mask))
        same = same_captions(ids, mask) | same_images(pixels)
        crossed, tokens = phase.caption_losses(image, ids, mask)  # captions decoded from the latents of the images
        repeated, _ = phase.caption_losses(caption, ids, mask)
        decoded = self.model.decode_image(image).float()
        cosines = torch.nn.functional.cosine_similarity(image[:, None], caption[None], dim=2)
        sums = {
            "count": torch.tensor(len(pixels)),
            "tokens": tokens.sum(),
            "told": crossed.sum(),
            "caption": ((1 - share) * repeated / tokens + share * crossed / tokens).sum(),
            "shown": scaled_errors(decoded, pixels, phase.variance).sum(),
            "drawn": phase.image_losses(caption, batch).sum(),
            "alignment": phase.alignment_losses(image, caption, same).sum(),
            "psnr": psnr(decoded, pixels).sum(),
            "ssim": ssim(decoded, pixels).sum(),
            "true": cosines.diagonal().sum(),
            # Cosines of each image with every mismatched caption of the batch; a batch of one has none.
            "shuffled": cosines.masked_fill(same, 0).sum(),
            "shuffled_count": (~same).sum(),
        }
        if self.prior is not None and self.prior.has_learned:
            latents = phase.image_latents(batch, draws)
            sums["prior"] = self.prior_phase.losses(latents, draws, 1, sampling="uniform").sum()
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        config, count, tokens = self.config, sums["count"], sums["tokens"]
        share = config.cross_share
        image_loss = ((1 - share) * sums["shown"] + share * sums["drawn"]) / count
        caption_loss = sums["caption"] / count
        weighted = config.image_weight * image_loss + config.caption_weight * caption_loss
        metrics = {
            "val_loss": weighted + config.alignment_weight * sums["alignment"] / count,
            "val_image_loss": image_loss,
            "val_caption_loss": caption_loss,
            "val_alignment_loss": sums["alignment"] / count,
            "val_perplexity": float(torch.tensor(sums["told"] / tokens, dtype=torch.float64).exp()),
            "val_psnr": sums["psnr"] / count,
            "val_ssim": sums["ssim"] / count,
            "val_alignment_score": sums["true"] / count,
            "val_alignment_score_shuffled": sums["shuffled"] / max(sums["shuffled_count"], 1),
        }
        return metrics | ({"val_prior_loss": sums["prior"] / count} if "prior" in sums else {})

    def previews(self, exchange: Exchange) -> Previews:
        return caption_previews(self.pipeline(), self.shown_data, self.config, functools.partial(self.divide, exchange))

    def usage(self, model: str) -> str:
        return command_with("pipelines/sample.py", {"model": model, "pairs": "8", "output": "pairs.png"})

    def pipeline(self):
        from pipelines.common.schedulers import sampling_scheduler, training_scheduler
        from pipelines.image_caption import ImageCaptionPipeline

        return ImageCaptionPipeline(
            model=self.model,
            tokenizer=self.tokenizer,
            scheduler=sampling_scheduler(training_scheduler("flow_prediction")),
            # Before `--prior.start` the prior is untrained, and its samples would be noise.
            prior=self.prior if self.prior is not None and self.prior.has_learned else None,
            image_fit=self.config.image_fit,
            aspect_ratio=self.aspect_ratio,
            image_interpolation_mode=self.config.image_interpolation_mode,
        )


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET, complete=complete_image_caption)
    return train(ImageCaptionStage, config)


if __name__ == "__main__":
    entry_point(main)
