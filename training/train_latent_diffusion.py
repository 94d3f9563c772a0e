"""Train latent diffusion from scratch: caption and/or class label (or neither) → latents → picture.

    accelerate launch training/train_latent_diffusion.py                  # the quickstart's posters, made for you
    accelerate launch training/train_latent_diffusion.py --config configs/experiments/latent_diffusion/emoji_64.yaml
    accelerate launch training/train_latent_diffusion.py --train_data_dir my_pictures --vae runs/autoencoder \\
        --tokenizer my_pictures_tokenizer --output_dir runs/mine

Typed again, a command goes on where the run stood.
B batch, C latent channels, h w latent cells, L tokens, D text width.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.tools.cli import UserError, entry_point
from training.core.batches import fetch, to_device
from training.core.checks import check_at_least, check_choice, check_deepest_feature_map
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.run_config import RunConfig, option
from training.core.stage import Batch, MapDataset, Phase, Stage
from training.data.checks import require_clean
from training.data.fingerprints import evenly_spaced
from training.data.images import DataConfig, ImageDataset, load_label_map, load_split, validate_data_config
from training.data.latent_cache.check import check_cache
from training.data.latent_cache.dataset import LatentCache
from training.data.tokenization import CaptionTokens, load_tokenizer
from training.engine.loop import train
from training.engine.weights import load_initial_weights
from training.metrics.images import to_pil
from training.models.attention import attention_kernel
from training.models.caption_prior import (
    CaptionPriorConfig,
    build_caption_prior,
    validate_caption_prior_config,
    warm_up,
)
from training.models.conditioning import batch_latents, caption_and_class
from training.models.text_encoder import (
    TextEncoderConfig,
    check_vocabulary,
    load_text_encoder,
    new_text_encoder,
    validate_text_encoder_config,
)
from training.models.unet import UNetConfig, build_unet, validate_unet_config
from training.models.vae_loading import load_vae
from training.objectives.diffusion import Diffusion, DiffusionConfig, validate_diffusion_config
from training.objectives.functional import mse_per_sample
from training.run.folder import has_checkpoint

logger = logging.getLogger("halftone")

PRESET = "configs/experiments/latent_diffusion/quickstart.yaml"


@dataclass
class Config(DiffusionConfig, RunConfig, DataConfig):
    """Flags of train_latent_diffusion.py."""

    output_dir: str = option("runs/latent_diffusion", on_resume="free")
    """The run folder"""
    vae: str = option("", on_resume="error")
    """Autoencoder of the latents: a Hub id, a VAE or pipeline folder, or the run folder of an autoencoder"""
    latent_cache: str | None = option(None, on_resume="error")
    """Latents made by data_scripts/precompute_latents.py; unset encodes pictures as they come"""
    condition_on: list[str] = option(["caption"], on_resume="error")
    """What steers: [caption], [label], [caption, label] or []"""
    tokenizer: str | None = option(None, on_resume="error")
    """Tokenizer folder or name, e.g. made by data_scripts/train_tokenizer.py; unset: that of the pretrained encoder"""
    pretrained_text_encoder: str | None = option(None, on_resume="error")
    """A text encoder of Transformers by name or folder, kept frozen; unset trains a small one of our own"""
    model: UNetConfig = field(default_factory=UNetConfig, metadata={"on_resume": "error"})
    """The U-Net"""
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig, metadata={"on_resume": "error"})
    """The text encoder trained jointly"""
    caption_prior: CaptionPriorConfig = field(default_factory=CaptionPriorConfig, metadata={"on_resume": "error"})
    """A prediction of the latents from the caption alone, beside the U-Net's input"""
    init_from: str | None = option(None)
    """Start from the weights of a run, checkpoint or pipeline; steps and optimizer start anew"""
    preview_prompts: list[str] | None = option(None, on_resume="free")
    """Prompts of the previews; unset takes captions of the validation data"""
    preview_guidance_scale: float = option(2.5, on_resume="free")
    """Guidance of the previews"""
    preview_inference_steps: int = option(25, on_resume="free")
    """Sampling steps of the previews"""
    num_previews: int = option(8, on_resume="free")
    """Pictures in a preview"""

    def validate(self) -> None:
        super().validate()
        validate_data_config(self)
        validate_diffusion_config(self)
        validate_unet_config(self.model)
        validate_text_encoder_config(self.text_encoder)
        validate_caption_prior_config(self.caption_prior, "caption" in self.condition_on)
        for condition in self.condition_on:
            check_choice("condition_on", condition, ("caption", "label"))
        check_at_least("num_previews", self.num_previews, 1)
        if not self.vae:
            raise UserError(
                "no autoencoder was named; give --vae: a Hub id such as stabilityai/sdxl-vae, a folder, "
                "or a run of train_autoencoder.py"
            )
        if "caption" in self.condition_on and not (self.tokenizer or self.pretrained_text_encoder):
            raise UserError(
                "captions need --tokenizer (python data_scripts/train_tokenizer.py makes one) "
                "or --pretrained_text_encoder; to train without captions: --condition_on '[]'"
            )


class LatentDiffusionPhase(Phase):
    """The denoising loss on latents, with the condition dropped for some samples.

    Args:
        latent_shape: C, h, w.
        text_encoder: trained along, unless `config` names a pretrained one; None for a model without text.
        empty_ids: token ids of the empty caption, 1 L; they come with the text encoder.
        caption_prior: trained along; None for a model without one.
    """

    name = "diffusion"

    def __init__(
        self,
        config: Config,
        unet: nn.Module,
        diffusion: Diffusion,
        vae: nn.Module,
        latent_shape: tuple[int, int, int],
        text_encoder: nn.Module | None = None,
        empty_ids: Tensor | None = None,
        caption_prior: nn.Module | None = None,
    ):
        super().__init__()
        self.config, self.diffusion, self.latent_shape = config, diffusion, latent_shape
        self.unet = unet
        if config.pretrained_text_encoder and text_encoder is not None:
            self.borrow(text_encoder=text_encoder)
        else:
            self.text_encoder = text_encoder
        self.caption_prior = caption_prior
        self.borrow(vae=vae)
        self.register_buffer("empty_ids", empty_ids, persistent=False)

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """B C h w, scaled."""
        return batch_latents(self.vae, batch, draws, self.latent_shape)

    def condition(self, batch: Batch, dropped: Tensor) -> dict[str, Tensor | None]:
        """The U-Net's arguments beside latents and timesteps; `dropped`: B, bool."""
        return caption_and_class(self.unet, self.text_encoder, self.empty_ids, batch, dropped)

    def losses(
        self, batch: Batch, draws: Draws, dropout: float, sampling: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Of denoising, and of the caption prior where there is one; per sample. B each."""
        from pipelines.latent_diffusion import beside

        x_0 = self.latents(batch, draws)
        noisy = self.diffusion.corrupt(x_0, draws, sampling=sampling)
        condition = self.condition(batch, draws.uniform("cfg_dropout") < dropout)
        expected = self.caption_prior(condition["encoder_hidden_states"]) if self.caption_prior is not None else None
        with attention_kernel(x_0[0, 0].numel(), self.config.gradient_checkpointing):
            prediction = self.unet(beside(noisy.x_t, expected), noisy.timesteps, **condition).sample
        return noisy.loss(prediction), None if expected is None else mse_per_sample(expected, x_0)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        losses, prior_losses = self.losses(batch, draws, self.config.cfg_dropout)
        if prior_losses is None:
            return losses.mean(), {}
        denoising, prior = losses.mean(), prior_losses.mean()
        metrics = {"denoising_loss": denoising.detach(), "caption_prior_loss": prior.detach()}
        return denoising + self.config.caption_prior.weight * prior, metrics


class LatentDiffusionStage(Stage):
    name = "latent diffusion"
    card_template = "latent_diffusion.md.jinja"

    def __init__(self, config: Config):
        from pipelines.common.latents import latent_shape

        self.config = config
        self.vae = load_vae(config.vae)
        self.with_captions, self.with_labels = "caption" in config.condition_on, "label" in config.condition_on
        # Weights are drawn from here on, in this order: the text encoder's, the U-Net's, the caption prior's.
        torch.manual_seed(config.seed)
        self.caption_tokens, self.text_encoder = self._text()
        self._train, self._validation, self.id2label = self._open_data()
        shape = latent_shape(self.vae, config.resolution, config.resolution)
        levels = len(config.model.block_out_channels)
        check_deepest_feature_map(shape[1], 1, levels, "--model.block_out_channels", "the latents' side")
        text_width = self.text_encoder.config.hidden_size if self.with_captions else None
        with_prior = config.caption_prior.hidden_size > 0
        expected = shape[0] if with_prior else 0
        self.unet = build_unet(config.model, shape[0], shape[1], text_width, len(self.id2label), expected)
        self.diffusion = Diffusion(config)
        self.trivial_loss = self.diffusion.trivial_loss
        if with_prior:
            self.trivial_loss = self.trivial_loss and self.trivial_loss + config.caption_prior.weight
        caption_prior = build_caption_prior(config.caption_prior, text_width, shape) if with_prior else None  # type: ignore[arg-type]
        empty_ids = self.caption_tokens([""])["input_ids"] if self.caption_tokens else None
        self.phase = LatentDiffusionPhase(
            config, self.unet, self.diffusion, self.vae, shape, self.text_encoder, empty_ids, caption_prior
        )
        self.phases, self.ema_of = [self.phase], dict(self.phase.named_children())
        self.frozen = [self.vae]
        if config.pretrained_text_encoder and self.with_captions:
            self.frozen.append(self.text_encoder)
        if not has_checkpoint(config.output_dir):
            if config.init_from:
                load_initial_weights(config.init_from, self.ema_of)
            elif with_prior and config.trains:
                self._warm_up_caption_prior()

    def _open_data(self) -> tuple[MapDataset, MapDataset | None, dict[int, str]]:
        """Training and validation data, and the class names (none without labels)."""
        config = self.config
        if config.latent_cache:
            cache = LatentCache(config.latent_cache)
            check_cache(cache, self.vae, config.vae, config)
            if self.with_captions and not cache.has_captions:
                raise UserError(f"the latent cache {config.latent_cache} has no captions; make it with captions")
            if self.with_labels and not cache.id2label:
                raise UserError(f"the latent cache {config.latent_cache} has no labels; make it with labels")
            flags: dict[str, Any] = {"caption_tokens": self.caption_tokens}
            cached = cache.split("train", random_flip=config.random_flip, config=config, **flags)
            validation = cache.split("validation", **flags) if "validation" in cache.splits else None
            return cached, validation, cache.id2label if self.with_labels else {}
        flags = {
            "captions": self.with_captions,
            "caption_tokens": self.caption_tokens,
            "labels": self.with_labels,
        }
        label_map = load_label_map(config) if self.with_labels else None  # of all splits: one may lack a class
        train_data = ImageDataset(load_split(config, "train", config.seed), config, **flags, label_map=label_map)
        require_clean(train_data, tell=logger.info)
        held_out = load_split(config, "validation", config.seed)
        if not len(held_out):
            return train_data, None, train_data.id2label
        validation = ImageDataset(held_out, config, **flags, label_map=label_map, augment=False)
        require_clean(validation, tell=logger.info)
        return train_data, validation, train_data.id2label

    def _text(self) -> tuple[CaptionTokens | None, Any]:
        """Token ids of captions, and what reads them; both None without captions."""
        from pipelines.latent_diffusion import max_caption_length

        config = self.config
        if not self.with_captions:
            return None, None
        tokenizer = load_tokenizer(config.tokenizer or config.pretrained_text_encoder)  # type: ignore[arg-type]
        if config.pretrained_text_encoder:
            encoder = load_text_encoder(config.pretrained_text_encoder)
        else:
            encoder = new_text_encoder(config.text_encoder, tokenizer)
        check_vocabulary(tokenizer, encoder)
        limit = config.text_encoder.max_length
        with contextlib.suppress(ValueError):  # neither has a limit of its own
            limit = min(limit, max_caption_length(tokenizer, encoder))
        return CaptionTokens(tokenizer, limit, padding="max_length"), encoder

    def _warm_up_caption_prior(self) -> None:
        """Before the loop, on every process alike, on pictures from all over the data."""
        config, phase = self.config.caption_prior, self.phase
        input_ids: list[Tensor] = []
        latents: list[Tensor] = []
        sampled = evenly_spaced(len(self._train), config.warmup_samples)
        for start in range(0, len(sampled), config.warmup_batch_size):
            rows = sampled[start : start + config.warmup_batch_size]
            batch = fetch(self._train, [SampleKey(row, 0) for row in rows])
            input_ids.append(batch["input_ids"])
            latents.append(phase.latents(batch, Draws(self.config.seed, 0, rows, torch.device("cpu"))))
        captions, expected = torch.cat(input_ids), torch.cat(latents)
        warm_up(phase.caption_prior, phase.text_encoder, captions, expected, config, self.config.seed)

    def train_data(self) -> MapDataset:
        return self._train

    def validation_data(self) -> MapDataset | None:
        return self._validation

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        losses, _ = self.phase.losses(batch, draws, dropout=0.0, sampling="uniform")
        return {"loss": losses.sum(), "count": torch.tensor(len(losses))}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"val_loss": sums["loss"] / sums["count"]}

    def previews(self) -> Previews:
        from pipelines.common.latents import decode_latents

        config, data = self.config, self._validation or self._train
        batch = fetch(data, [SampleKey(i, 0) for i in range(min(config.num_previews, len(data)))])
        arguments: dict[str, Any] = {}
        captions = [f"sample {i + 1}" for i in range(config.num_previews)]
        if self.with_captions:
            captions = (config.preview_prompts or batch["caption"])[: config.num_previews]
            arguments["prompt"] = captions
        if self.with_labels:
            labels = (
                [i % len(self.id2label) for i in range(len(captions))] if config.preview_prompts else batch["label"]
            )
            arguments["class_labels"] = labels
            names = [self.id2label[int(label)] for label in labels]
            captions = [f"{c} [{n}]" for c, n in zip(captions, names)] if self.with_captions else names
        if not arguments:
            arguments["num_images_per_prompt"] = config.num_previews
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(config.seed + i) for i in range(len(captions))]
        images = pipeline(
            **arguments,
            generator=generators,
            guidance_scale=config.preview_guidance_scale,
            num_inference_steps=config.preview_inference_steps,
            callback_on_step_end=self._between_steps,
        ).images
        if "pixel_values" in batch:
            references = batch["pixel_values"]
        else:
            device = next(self.unet.parameters()).device
            draws = Draws(0, "previews", range(len(batch["mean"])), device)
            references = decode_latents(self.vae, self.phase.latents(to_device(batch, device), draws))
        return Previews(images, list(captions), [to_pil(image) for image in references])

    def _between_steps(self, pipeline, step, timestep, tensors) -> dict:
        self.poll()
        return {}

    def pipeline(self):
        from pipelines.common.schedulers import sampling_scheduler
        from pipelines.latent_diffusion import LatentDiffusionPipeline

        tokens = self.caption_tokens
        return LatentDiffusionPipeline(
            vae=self.vae,
            unet=self.unet,
            scheduler=sampling_scheduler(self.diffusion.scheduler),
            text_encoder=self.text_encoder,
            tokenizer=tokens.tokenizer if tokens else None,
            id2label=self.id2label or None,
            max_text_length=tokens.max_length if tokens else None,
            caption_prior=self.phase.caption_prior,
        )


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(lambda: LatentDiffusionStage(config), config)


if __name__ == "__main__":
    entry_point(main)
