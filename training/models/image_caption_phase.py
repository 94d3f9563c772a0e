"""The objective of the joint model of images and captions: reconstruction from either latent, alignment, and KL.

B pairs, D size of the latent vector, L tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.tools.cli import UserError
from training.core.draws import Draws
from training.core.options import Options, option
from training.core.stage import Batch, Phase
from training.models.attention import attention_kernel, one_sequence_per_row
from training.objectives.captions import (
    contrastive_losses,
    cosine_distances,
    same_captions,
    same_images,
    scaled_errors,
    token_losses,
    with_unknown_words,
)
from training.objectives.functional import gaussian_kl


@dataclass
class ImageCaptionObjectiveConfig(Options):
    """Weights of the losses, and the shares of latents and words that are exchanged or dropped in training."""

    image_weight: float = option(1.0, on_resume="warn", at_least=0)
    """Weight of the image loss: squared error divided by the variance of the training images"""
    caption_weight: float = option(1.0, on_resume="warn", at_least=0)
    """Weight of the caption loss: cross-entropy averaged over the caption's tokens"""
    alignment_weight: float = option(0.5, on_resume="warn", at_least=0)
    """Weight of the alignment loss: symmetric InfoNCE plus the cosine distance between the two latents of a pair"""
    kl_weight: float = option(1e-3, on_resume="warn", at_least=0)
    """Weight of the posteriors' KL divergence from a standard normal distribution, averaged over the latent vector"""
    cross_share: float = option(0.5, on_resume="warn", at_least=0, at_most=1)
    """Fraction of images decoded from their caption's latent, and of captions decoded from their image's latent"""
    word_dropout: float = option(0.1, on_resume="warn", at_least=0, at_most=1)
    """Fraction of words that the caption encoder reads as <UNK> in training, so that it learns to handle unknown
    words"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not (self.image_weight or self.caption_weight or self.alignment_weight):
            raise UserError(
                "nothing to learn from: one of --image_weight, --caption_weight, --alignment_weight must be above 0"
            )


class ImageCaptionPhase(Phase):
    """Reconstruction of images and captions from either latent, alignment of the two, and KL.

    Args:
        config: an ImageCaptionObjectiveConfig that also has `gradient_checkpointing`.
        variance: variance of the training images' pixels, by which squared errors are divided.
    """

    name = "image_caption"

    def __init__(self, model: Any, config: Any, variance: float):
        super().__init__()
        self.model, self.config = model, config
        self.register_buffer("variance", torch.tensor(variance), persistent=False)
        # Parameters that only a loss of weight 0 uses are frozen: DDP would wait for their gradients, and weight decay
        # would shrink them.
        unused = {
            "image_weight": model.image_decoder.parameters(),
            "caption_weight": model.caption_decoder.parameters(),
            "alignment_weight": [model.logit_scale],
        }
        for weight, parameters in unused.items():
            for parameter in parameters if not getattr(config, weight) else ():
                parameter.requires_grad_(False)

    def read_ids(self, ids: Tensor, mask: Tensor, draws: Draws) -> Tensor:
        """Return the input ids of the caption encoder in training: a share `word_dropout` of words is <UNK>. B L."""
        unknown = self.model.config.unknown_token_id
        if not self.config.word_dropout or unknown is None:
            return ids
        chosen = draws.uniform("words", (self.model.config.max_length,)) < self.config.word_dropout
        return with_unknown_words(ids, mask, chosen, unknown)

    def posteriors(self, batch: Batch, ids: Tensor, mask: Tensor) -> tuple[Any, Any]:
        """Return the posteriors of a batch's images and of its captions."""
        with attention_kernel(ids.shape[1], self.config.gradient_checkpointing):
            images = self.model.encode_image(batch["pixel_values"])
            return images, self.model.encode_caption(ids, mask, batch.get("has_padding"))

    def image_latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Draw latents from the posteriors of a batch's images. B D."""
        posterior = self.model.encode_image(batch["pixel_values"])
        return posterior.sample(draws.normal("prior_latents", posterior.mean.shape[1:]))

    def image_losses(self, latents: Tensor, batch: Batch) -> Tensor:
        """Compute the scaled squared error of each image. B."""
        return scaled_errors(self.model.decode_image(latents), batch["pixel_values"], self.variance)

    def caption_losses(self, latents: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the sum of each caption's token losses, and its number of tokens. B each."""
        tokens = ids.shape[1] + self.model.config.prefix_length
        with attention_kernel(tokens, self.config.gradient_checkpointing), one_sequence_per_row():
            return token_losses(self.model.caption_logits(latents, ids), ids, mask)

    def alignment_losses(self, image: Tensor, caption: Tensor, same: Tensor) -> Tensor:
        """Compute InfoNCE plus the cosine distance of posterior means. B; pairs in `same` (B B) are not negatives."""
        contrast = contrastive_losses(image, caption, self.model.similarity_scale(), same)
        return contrast + cosine_distances(image, caption)

    def terms(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Compute the terms of the loss, by the name of their weight; a term of weight 0 carries no gradient."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        image, caption = self.posteriors(batch, self.read_ids(ids, mask, draws), mask)
        drawn = [part.sample(draws.normal(name, part.mean.shape[1:])) for name, part in _named(image, caption)]
        for_images = _either(drawn[0], drawn[1], draws.uniform("image_route") < self.config.cross_share)
        for_captions = _either(drawn[1], drawn[0], draws.uniform("caption_route") < self.config.cross_share)

        same = same_captions(ids, mask) | same_images(batch["pixel_values"])

        def caption_loss() -> Tensor:
            # Every caption has the same weight, whatever its number of tokens, so that the loss does not depend on how
            # the batch is split into micro-batches.
            sums, counts = self.caption_losses(for_captions, ids, mask)
            return (sums / counts).mean()

        def kl() -> Tensor:
            return 0.5 * sum(gaussian_kl(part.mean, part.logvar).mean() for part in (image, caption))

        compute: dict[str, Callable[[], Tensor]] = {
            "image_weight": lambda: self.image_losses(for_images, batch).mean(),
            "caption_weight": caption_loss,
            "alignment_weight": lambda: self.alignment_losses(image.mean, caption.mean, same).mean(),
            "kl_weight": kl,
        }
        terms = {}
        for weight, term in compute.items():
            with contextlib.nullcontext() if getattr(self.config, weight) else torch.no_grad():
                terms[weight] = term()
        return terms

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.terms(batch, draws)
        weighted = [getattr(self.config, w) * value for w, value in terms.items() if getattr(self.config, w)]
        names = {"image_weight": "image_loss", "caption_weight": "caption_loss", "alignment_weight": "alignment_loss"}
        metrics = {names.get(weight, "kl"): value.detach() for weight, value in terms.items()}
        return torch.stack(weighted).sum(), metrics


def _named(image: Any, caption: Any) -> list[tuple[str, Any]]:
    return [("image_posterior", image), ("caption_posterior", caption)]


def _either(own: Tensor, other: Tensor, crossed: Tensor) -> Tensor:
    """Return rows of `other` where `crossed` (B, bool) is True, and rows of `own` elsewhere. B D."""
    return torch.where(crossed[:, None], other, own)
