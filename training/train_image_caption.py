"""Train a joint model of captioned pictures: it captions a picture, draws a caption, and invents pairs of both.

    accelerate launch training/train_image_caption.py                     # the quickstart's posters, made for you
    accelerate launch training/train_image_caption.py --config configs/experiments/image_caption/emoji_64.yaml
    accelerate launch training/train_image_caption.py --train_data_dir my_pictures --output_dir runs/mine

The tokenizer is built from the captions, unless one is named. Typed again, a command goes on where the run stood.
B pairs, D latent vector, L tokens, R resolution.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.tools.cli import UserError, entry_point
from training.core.checks import check_at_least
from training.core.draws import Draws
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, Phase, Stage
from training.data.captions import (
    CaptionDataConfig,
    CaptionedPictures,
    load_captioned,
    pixel_variance,
    tell_round_trips,
    tokenizer_for,
    validate_caption_data_config,
)
from training.data.checks import require_clean
from training.data.images import load_split
from training.data.tokenization import CaptionTokens
from training.engine.run_config import RunConfig
from training.engine.session import train
from training.engine.weights import load_initial_weights
from training.metrics.images import psnr, ssim
from training.models.attention import attention_kernel
from training.models.caption_previews import caption_previews
from training.models.image_caption import ImageCaptionModelConfig, build_model, model_summary, validate_model_config
from training.models.latent_prior import LatentPriorConfig, LatentPriorPhase, validate_latent_prior_config
from training.objectives.captions import (
    contrastive_losses,
    cosine_distances,
    same_captions,
    same_pictures,
    scaled_errors,
    token_losses,
    with_unknown_words,
)
from training.objectives.functional import gaussian_kl
from training.run.folder import has_checkpoint

logger = logging.getLogger("halftone")

PRESET = "configs/experiments/image_caption/tiny.yaml"
VARIANCE_PICTURES = 256
WEIGHTS = ("image_weight", "caption_weight", "alignment_weight", "kl_weight")


@dataclass
class Config(RunConfig, CaptionDataConfig):
    """Flags of train_image_caption.py."""

    output_dir: str = option("runs/image_caption", on_resume="free")
    """The run folder"""
    lr_scheduler: str = option("cosine", on_resume="warn")
    """Constant, linear, cosine, ...: see docs/runs.md"""
    model: ImageCaptionModelConfig = option(ImageCaptionModelConfig)
    """Encoders and decoders of pictures and captions"""
    prior: LatentPriorConfig = option(LatentPriorConfig)
    """The latent prior that invents pairs"""
    image_weight: float = option(1.0, on_resume="warn")
    """Weight of the picture's squared error, in units of the pictures' variance"""
    caption_weight: float = option(1.0, on_resume="warn")
    """Weight of the caption's cross-entropy, the mean over its tokens"""
    alignment_weight: float = option(0.5, on_resume="warn")
    """Weight of the symmetric InfoNCE loss and the cosine distance between a pair's two latents"""
    kl_weight: float = option(1e-3, on_resume="warn")
    """Weight of the posteriors' KL divergence to a standard normal, per latent number"""
    cross_share: float = option(0.5, on_resume="warn")
    """Share of pictures that are decoded from their caption's latent, and of captions from their picture's"""
    word_dropout: float = option(0.1, on_resume="warn")
    """Share of its words that a caption's encoder reads as <UNK> in training, so that unknown words mean something"""
    init_from: str | None = option(None, on_resume="warn")
    """Start from the weights of a run, checkpoint or pipeline; steps and optimizer start anew"""
    preview_prompts: list[str] | None = option(None, on_resume="free")
    """Captions that the previews draw; unset takes those of the first validation pictures"""
    preview_inference_steps: int = option(25, on_resume="free")
    """Sampling steps of the previews' invented pairs"""
    num_previews: int = option(6, on_resume="free")
    """Pictures in a row of the previews"""

    def validate(self) -> None:
        super().validate()
        validate_data_config(self)
        validate_caption_data_config(self)
        validate_model_config(self.model, self.resolution)
        validate_latent_prior_config(self.prior)
        for name in WEIGHTS:
            check_at_least(name, getattr(self, name), 0)
        check_at_least("num_previews", self.num_previews, 1)
        if not all(prompt.strip() for prompt in self.preview_prompts or []):
            raise UserError(f"--preview_prompts {self.preview_prompts} has an empty caption; each must say something")
        if not (self.image_weight or self.caption_weight or self.alignment_weight):
            raise UserError(
                "nothing to learn from: one of --image_weight, --caption_weight, --alignment_weight must be above 0"
            )
        if self.alignment_weight and self.train_batch_size < 2:
            raise UserError(
                "--train_batch_size 1 has no other pair to tell a pair from, which --alignment_weight "
                f"{self.alignment_weight} needs; raise the batch size, or set the weight to 0"
            )
        for name in ("cross_share", "word_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it is a share in [0, 1]")


class ImageCaptionPhase(Phase):
    """Reconstruction of pictures and captions from either latent, alignment of the two, and KL."""

    name = "image_caption"

    def __init__(self, model: Any, config: Config, variance: float):
        super().__init__()
        self.model, self.config = model, config
        self.register_buffer("variance", torch.tensor(variance), persistent=False)
        # Parameters that no gradient reaches: DDP would wait for it, and weight decay would shrink them.
        unused = {
            "image_weight": model.image_decoder.parameters(),
            "caption_weight": model.caption_decoder.parameters(),
            "alignment_weight": [model.logit_scale],
        }
        for weight, parameters in unused.items():
            for parameter in parameters if not getattr(config, weight) else ():
                parameter.requires_grad_(False)

    def read_ids(self, ids: Tensor, mask: Tensor, draws: Draws) -> Tensor:
        """What the caption's encoder reads in training: `--word_dropout` of the words are unknown. B L."""
        unknown = self.model.config.unknown_token_id
        if not self.config.word_dropout or unknown is None:
            return ids
        chosen = draws.uniform("words", (self.model.config.max_length,)) < self.config.word_dropout
        return with_unknown_words(ids, mask, chosen, unknown)

    def posteriors(self, batch: Batch, ids: Tensor, mask: Tensor) -> tuple[Any, Any]:
        """Of pictures and of captions."""
        with attention_kernel(ids.shape[1], self.config.gradient_checkpointing):
            return self.model.encode_image(batch["pixel_values"]), self.model.encode_caption(ids, mask)

    def image_latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Drawn from the pictures' posteriors. B D."""
        posterior = self.model.encode_image(batch["pixel_values"])
        return posterior.sample(draws.normal("prior_latents", posterior.mean.shape[1:]))

    def image_losses(self, latents: Tensor, batch: Batch) -> Tensor:
        """B."""
        return scaled_errors(self.model.decode_image(latents), batch["pixel_values"], self.variance)

    def caption_losses(self, latents: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over each caption's tokens, and their counts. B each."""
        with attention_kernel(ids.shape[1] + self.model.config.prefix_length, self.config.gradient_checkpointing):
            return token_losses(self.model.caption_logits(latents, ids), ids, mask)

    def alignment_losses(self, image: Tensor, caption: Tensor, same: Tensor) -> Tensor:
        """InfoNCE and cosine distance of posterior means; `same` (B B) are no wrong answers to each other. B."""
        contrast = contrastive_losses(image, caption, self.model.similarity_scale(), same)
        return contrast + cosine_distances(image, caption)

    def terms(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The loss's terms by the name of their weight; one whose weight is 0 carries no gradient."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        image, caption = self.posteriors(batch, self.read_ids(ids, mask, draws), mask)
        drawn = [part.sample(draws.normal(name, part.mean.shape[1:])) for name, part in _named(image, caption)]
        shown = _either(drawn[0], drawn[1], draws.uniform("image_route") < self.config.cross_share)
        told = _either(drawn[1], drawn[0], draws.uniform("caption_route") < self.config.cross_share)

        same = same_captions(ids, mask) | same_pictures(batch["pixel_values"])

        def caption_loss() -> Tensor:
            # Each caption counts the same, however many its tokens: any split into micro-batches is the same loss.
            sums, counts = self.caption_losses(told, ids, mask)
            return (sums / counts).mean()

        def kl() -> Tensor:
            return 0.5 * sum(gaussian_kl(part.mean, part.logvar).mean() for part in (image, caption))

        compute: dict[str, Callable[[], Tensor]] = {
            "image_weight": lambda: self.image_losses(shown, batch).mean(),
            "caption_weight": caption_loss,
            "alignment_weight": lambda: self.alignment_losses(image.mean, caption.mean, same).mean(),
            "kl_weight": kl,
        }
        found = {}
        for weight, term in compute.items():
            with contextlib.nullcontext() if getattr(self.config, weight) else torch.no_grad():
                found[weight] = term()
        return found

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.terms(batch, draws)
        weighted = [getattr(self.config, w) * value for w, value in terms.items() if getattr(self.config, w)]
        names = {"image_weight": "image_loss", "caption_weight": "caption_loss", "alignment_weight": "alignment_loss"}
        metrics = {names.get(weight, "kl"): value.detach() for weight, value in terms.items()}
        return torch.stack(weighted).sum(), metrics


def _named(image: Any, caption: Any) -> list[tuple[str, Any]]:
    return [("image_posterior", image), ("caption_posterior", caption)]


def _either(own: Tensor, other: Tensor, crossed: Tensor) -> Tensor:
    """Rows of `other` where `crossed` (B, bool), else of `own`. B D."""
    return torch.where(crossed[:, None], other, own)


class ImageCaptionStage(Stage):
    name = "image caption"
    card_template = "image_caption.md.jinja"

    def __init__(self, config: Config):
        self.config = config
        weights, max_length = self._weights(), config.model.max_length
        self.tokenizer = tokenizer_for(config, load_split(config, "train", config.seed), max_length, weights)
        caption_tokens = CaptionTokens(self.tokenizer, max_length, padding="longest")
        self._train, self._validation = load_captioned(config, config.seed, caption_tokens)
        for data in filter(None, (self._train, self._validation)):
            require_clean(data, tell=logger.info)
        seen, which = (self._validation, "validation") if self._validation else (self._train, "training")
        tell_round_trips(self.tokenizer, seen.captioned, self._train.captioned, config.caption_column, which)
        self.aspect_ratio = self._train.aspect_ratio()
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, config.resolution, self.tokenizer)
        self.phase = ImageCaptionPhase(self.model, config, pixel_variance(self._train, VARIANCE_PICTURES))
        self.phases, self.ema_of = [self.phase], {"model": self.model}
        # Weights from before `--prior.start` have no prior: a run that starts from them makes a new one.
        no_prior = weights is not None and not (weights / "prior").is_dir()
        wanted = config.prior.hidden_size and not (no_prior and config.validate_model)
        self.prior = self._new_prior() if wanted else None
        if self.prior is not None:
            self.prior_phase = LatentPriorPhase(self.prior, config.prior, self.phase.image_latents)
            self.phases, self.ema_of = [self.phase, self.prior_phase], {"model": self.model, "prior": self.prior}
        if config.init_from and not has_checkpoint(config.output_dir):
            load_initial_weights(config.init_from, {"model": self.model} if no_prior else self.ema_of)
        logger.info("%s", model_summary(self.ema_of))

    def _weights(self) -> Path | None:
        """The pipeline whose weights are gone on with: the run's own, or what was named."""
        from pipelines.tools.loading import find_pipeline

        config = self.config
        if config.validate_model:
            return find_pipeline(config.validate_model)
        if has_checkpoint(config.output_dir):
            return find_pipeline(config.output_dir, "latest")
        return find_pipeline(config.init_from) if config.init_from else None

    def _new_prior(self) -> Any:
        from pipelines.models.latent_prior import LatentPriorModel

        config = self.config.prior
        return LatentPriorModel(self.config.model.latent_size, config.hidden_size, config.num_layers)

    def train_data(self) -> CaptionedPictures:
        return self._train

    def validation_data(self) -> CaptionedPictures | None:
        return self._validation

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """By posterior means, each of picture and caption decoded from both."""
        phase, pixels, share = self.phase, batch["pixel_values"], self.config.cross_share
        ids, mask = batch["input_ids"], batch["attention_mask"]
        image, caption = (posterior.mean for posterior in phase.posteriors(batch, ids, mask))
        same = same_captions(ids, mask) | same_pictures(pixels)
        told, tokens = phase.caption_losses(image, ids, mask)
        repeated, _ = phase.caption_losses(caption, ids, mask)
        decoded = self.model.decode_image(image).float()
        cosines = torch.nn.functional.cosine_similarity(image[:, None], caption[None], dim=2)
        sums = {
            "count": torch.tensor(len(pixels)),
            "tokens": tokens.sum(),
            "told": told.sum(),
            "caption": ((1 - share) * repeated / tokens + share * told / tokens).sum(),
            "shown": scaled_errors(decoded, pixels, phase.variance).sum(),
            "drawn": phase.image_losses(caption, batch).sum(),
            "alignment": phase.alignment_losses(image, caption, same).sum(),
            "psnr": psnr(decoded, pixels).sum(),
            "ssim": ssim(decoded, pixels).sum(),
            "true": cosines.diagonal().sum(),
            # Of each picture with every other caption of the batch; a batch of one has none.
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
        found = {
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
        return found | ({"val_prior_loss": sums["prior"] / count} if "prior" in sums else {})

    def previews(self) -> Previews:
        return caption_previews(self.pipeline(), self._validation or self._train, self.config, self.poll)

    def pipeline(self):
        from pipelines.common.schedulers import sampling_scheduler, training_scheduler
        from pipelines.image_caption import ImageCaptionPipeline

        return ImageCaptionPipeline(
            model=self.model,
            tokenizer=self.tokenizer,
            scheduler=sampling_scheduler(training_scheduler("flow_prediction")),
            # Before `--prior.start` there is none that anybody could draw from.
            prior=self.prior if self.prior is not None and self.prior.has_learned else None,
            image_fit=self.config.image_fit,
            aspect_ratio=self.aspect_ratio,
            image_interpolation_mode=self.config.image_interpolation_mode,
        )


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(lambda: ImageCaptionStage(config), config)


if __name__ == "__main__":
    entry_point(main)
