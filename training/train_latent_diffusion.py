"""Train latent diffusion from scratch: caption and/or class label (or neither) → latents → image.

    accelerate launch training/train_latent_diffusion.py --train_data_dir my_images      # makes all else that it needs
    accelerate launch training/train_latent_diffusion.py                  # the quickstart's generated posters
    accelerate launch training/train_latent_diffusion.py --config configs/experiments/latent_diffusion/emoji_64.yaml

Run the same command again to resume the run.
"""

# Shapes: B batch, C latent channels, h w latent cells, L tokens.

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.commands import command, command_with
from training.core.draws import Draws
from training.core.exchange import Exchange
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, Phase, StageContext
from training.data.fingerprints import module_fingerprint, tokenizer_fingerprint, vae_fingerprint
from training.data.images import DataConfig, ImageDataset, load_label_map
from training.data.latent_cache.check import check_cache
from training.data.latent_cache.dataset import LatentCache
from training.engine.session import train
from training.models.attention import attention_kernel
from training.models.batch_latents import batch_images, batch_latents
from training.models.caption_prior import CaptionPriorConfig, build_caption_prior, regression_samples, warm_up
from training.models.conditioning import caption_and_class
from training.models.denoiser import build_denoiser, check_prediction, divisor_of_sides
from training.models.lora import LoRAAdapter
from training.models.text_encoder import TextEncoderConfig, build_text
from training.models.transformer import TransformerConfig
from training.models.unet import UNetConfig
from training.models.vae_loading import load_vae
from training.objectives.diffusion import Diffusion, DiffusionConfig, noise_level_sums
from training.objectives.functional import mse_per_sample
from training.recipes.completion import complete_latent_diffusion
from training.recipes.options import RecipeConfig
from training.stages.class_names import recorded_class_names
from training.stages.generating import GeneratingStage, RunEvaluationConfig
from training.stages.image_stage import ImageStageConfig, PreviewConfig, loss_sums
from training.stages.lora import LoRAStageConfig, LoRATraining
from training.stages.prompted_previews import prompted_previews

PRESET = "configs/experiments/latent_diffusion/quickstart.yaml"


CONDITION_NAMES = {"caption": "captions", "label": "classes"}


@dataclass
class Config(LoRAStageConfig, DiffusionConfig, PreviewConfig, RunEvaluationConfig, RecipeConfig, ImageStageConfig):
    """Flags of train_latent_diffusion.py."""

    image_modes = DataConfig.image_modes

    output_dir: str = option("runs/latent_diffusion", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    vae: str = option("", content="vae", essential=True)
    """VAE that encodes the images: Hub id, VAE or pipeline folder, or autoencoder run; pixels for none, to denoise the
    pixels themselves. If unset, one is trained for a U-Net, and none for a transformer"""
    latent_cache: str | None = option(None, content="latent_cache")
    """Folder of latents precomputed by data_scripts/precompute_latents.py with the same data, --vae, --resolution
    and --image_interpolation_mode. It requires --center_crop true, and for --random_flip a cache with flipped
    images. If unset, images are encoded at every step"""
    condition_on: list[str] = option(["caption"], choices=tuple(CONDITION_NAMES), essential=True)
    """Conditions of the model: caption, label, caption,label or none; if unset, what the images have"""
    tokenizer: str | None = option(None, content="tokenizer", essential=True)
    """Tokenizer folder or Hub id; if unset, that of the text encoder, or a new one is trained"""
    pretrained_text_encoder: str | None = option(None, content="text_encoder")
    """Transformers text encoder (Hub id or folder), kept frozen; if unset, a small text encoder is trained jointly"""
    denoiser: Literal["unet", "transformer"] = option("unet")
    """The network that denoises: a U-Net (--model), or a transformer on patches (--transformer), which needs no
    autoencoder (--vae pixels) for small images; if unset, own images without --config get what suits them"""
    model: UNetConfig = option(UNetConfig)
    """The U-Net"""
    transformer: TransformerConfig = option(TransformerConfig)
    """The transformer, with --denoiser transformer"""
    text_encoder: TextEncoderConfig = option(TextEncoderConfig)
    """The text encoder that is trained jointly, unless --pretrained_text_encoder is set"""
    caption_prior: CaptionPriorConfig = option(CaptionPriorConfig)
    """Caption prior: a small MLP that predicts the latents from the caption; its prediction is concatenated to the
    U-Net's input"""
    preview_prompts: list[str] | None = option(None, on_resume="free", essential=True)
    """Prompts of the previews, e.g. 'a red circle,a blue square'; if unset, captions of the data"""
    preview_guidance_scale: float = option(2.5, on_resume="free")
    """Guidance scale of the previews"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not self.vae:
            raise UserError(
                "--vae is not set; give a Hub id such as stabilityai/sdxl-vae, a folder, or a run of "
                "train_autoencoder.py; or give --train_data_dir without --config, and an autoencoder is trained"
            )
        check_prediction(self)
        if self.with_captions and not (self.tokenizer or self.pretrained_text_encoder):
            raise UserError(
                f"captions need --tokenizer (make one with {command('data_scripts/train_tokenizer.py')}) "
                "or --pretrained_text_encoder; to train without captions, use --condition_on '[]'"
            )
        if self.caption_prior.hidden_size and self.aspect_buckets:
            raise UserError(
                f"--caption_prior.hidden_size {self.caption_prior.hidden_size} predicts latents of one size, but "
                "--aspect_buckets true trains on several; set one of them to 0 or false"
            )
        if self.caption_prior.hidden_size and not self.with_captions:
            raise UserError("--caption_prior.hidden_size needs captions; set it to 0, or add caption to --condition_on")

    @property
    def consists_of_products(self) -> bool:
        return self.denoiser == "transformer"

    @property
    def with_captions(self) -> bool:
        return "caption" in self.condition_on

    @property
    def with_labels(self) -> bool:
        return "label" in self.condition_on


class LatentDiffusionPhase(Phase):
    """Denoising loss on latents, with the condition dropped for some samples.

    Args:
        text_encoder: trained jointly, unless `config` names a pretrained one; None for a model without captions.
        empty_ids: token ids of the empty caption, 1 L; required with a text encoder.
        caption_prior: trained jointly; None for a model without a caption prior.
        adapter: trained instead of the models, which are frozen.
    """

    name = "diffusion"

    def __init__(
        self,
        config: Config,
        denoiser: nn.Module,
        diffusion: Diffusion,
        vae: nn.Module,
        text_encoder: nn.Module | None = None,
        empty_ids: Tensor | None = None,
        caption_prior: nn.Module | None = None,
        adapter: LoRAAdapter | None = None,
    ):
        super().__init__()
        self.config, self.diffusion = config, diffusion
        # The denoiser has the name that it has in the pipeline.
        models = {config.denoiser: denoiser, "text_encoder": text_encoder, "caption_prior": caption_prior}
        borrowed = set(models) if adapter else {"text_encoder"} if config.pretrained_text_encoder else set()
        for name, model in models.items():
            if name in borrowed:
                self.borrow(**{name: model})
            else:
                setattr(self, name, model)
        if adapter is not None:
            self.adapter = adapter
        self.borrow(vae=vae)
        self.register_buffer("empty_ids", empty_ids, persistent=False)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self, self.config.denoiser)

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Return the scaled latents of a batch. B C h w."""
        return batch_latents(self.vae, batch, draws)

    def losses(
        self, batch: Batch, draws: Draws, dropout: float, sampling: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the denoising loss of each sample, and its caption prior loss where there is a prior. B each."""
        from pipelines.latent_diffusion import concat_condition

        x_0 = self.latents(batch, draws)
        noisy = self.diffusion.corrupt(x_0, draws, sampling=sampling)
        dropped = draws.uniform("cfg_dropout") < dropout
        condition = caption_and_class(self.denoiser, self.text_encoder, self.empty_ids, batch, dropped)
        prior = self.caption_prior(condition["encoder_hidden_states"]) if self.caption_prior is not None else None
        with attention_kernel(x_0[0, 0].numel(), self.config.gradient_checkpointing):
            prediction = self.denoiser(concat_condition(noisy.x_t, prior), noisy.timesteps, **condition).sample
        return noisy.loss(prediction), None if prior is None else mse_per_sample(prior, x_0)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        losses, prior_losses = self.losses(batch, draws, self.config.cfg_dropout)
        if prior_losses is None:
            return losses.mean(), {}
        denoising, prior = losses.mean(), prior_losses.mean()
        metrics = {"denoising_loss": denoising.detach(), "caption_prior_loss": prior.detach()}
        return denoising + self.config.caption_prior.weight * prior, metrics


class LatentDiffusionStage(GeneratingStage):
    name = "latent diffusion"
    card_template = "latent_diffusion.md.jinja"
    takes_aspect_buckets = True

    def __init__(self, config: Config, context: StageContext):
        from pipelines.common.latents import latent_shape

        super().__init__(config, context)
        self.cache: LatentCache | None = None
        self.vae = load_vae(config.vae, config.image_mode)
        # The order in which models are initialized below (text encoder, denoiser, caption prior) is part of what a seed
        # means: to change it would change every run.
        torch.manual_seed(config.seed)
        names = (config.tokenizer, config.pretrained_text_encoder) if config.with_captions else (None, None)
        self.tokens, self.text_encoder = build_text(config.text_encoder, *names)
        self.id2label = self._open_cache(config.latent_cache) if config.latent_cache else self._open_images()
        shape = latent_shape(self.vae, *self.image_size)
        text_width = self.text_encoder.config.hidden_size if self.text_encoder else None
        with_prior = config.caption_prior.hidden_size > 0
        sizes = (shape[0], shape[1:], text_width, len(self.id2label), with_prior * shape[0])
        denoiser = build_denoiser(config, *sizes)
        self.diffusion = Diffusion(config)
        self.conditions = [CONDITION_NAMES[name] for name in config.condition_on]
        trivial = self.diffusion.trivial_loss
        self.trivial_loss = trivial and trivial + with_prior * config.caption_prior.weight
        prior = build_caption_prior(config.caption_prior, text_width or 0, shape) if with_prior else None
        empty_ids = self.tokens([""])["input_ids"] if self.tokens else None
        self.lora = self._lora(denoiser, prior) if config.lora_rank else None
        adapter = None if self.lora is None else self.lora.adapter
        self.phase = LatentDiffusionPhase(
            config, denoiser, self.diffusion, self.vae, self.text_encoder, empty_ids, prior, adapter
        )
        self.phases, self.ema_of = [self.phase], dict(self.phase.named_children())
        self.frozen = [self.vae, self.text_encoder] if config.pretrained_text_encoder and self.tokens else [self.vae]
        if self.lora is None:
            self.take_initial_weights(self.ema_of)
        else:
            self.frozen, self.data_notes = [*self.frozen, *self.lora.models.values()], [self.lora.adapter.describe()]
        if with_prior and context.trains and not (context.resuming or config.init_from):
            samples = regression_samples(self.training_set, self.phase.latents, config.caption_prior, config.seed)
            warm_up(prior, self.text_encoder, *samples, config.caption_prior, config.seed)

    def _lora(self, denoiser: nn.Module, prior: nn.Module | None) -> LoRATraining:
        """Load the base model of a LoRA adapter, and add the adapter to its denoiser."""
        config = self.config
        models = {config.denoiser: denoiser, "caption_prior": prior}
        if not config.pretrained_text_encoder:
            models["text_encoder"] = self.text_encoder
        return LoRATraining(config, {k: model for k, model in models.items() if model is not None}, [config.denoiser])

    def _open_images(self) -> dict[int, str]:
        """Open the images and return the names of the classes; none without labels."""
        config = self.config
        columns = {"captions": config.with_captions, "caption_tokens": self.tokens, "labels": config.with_labels}
        recorded = recorded_class_names(config, self.context)
        label_map = load_label_map(config, recorded) if config.with_labels else None
        self.open_data(functools.partial(ImageDataset, config=config, label_map=label_map, **columns), *self._sides())
        return self.training_set.id2label

    def _sides(self) -> tuple[int, int]:
        """Return the number of pixels of which the sides of images must be multiples, and the smallest multiple."""
        from pipelines.common.latents import downsampling_factor

        divisor, least = divisor_of_sides(self.config)
        return downsampling_factor(self.vae) * divisor, least

    def _open_cache(self, path: str) -> dict[int, str]:
        """Open the cached latents and return the names of the classes; none without labels."""
        config, cache = self.config, LatentCache(path)
        self.cache = cache
        check_cache(cache, self.vae, config.vae, config)
        divisor, least_cells = self._sides()
        cache.require_sides(divisor, divisor * least_cells)
        cache.require(captions=config.with_captions, labels=config.with_labels)
        tokens = self.tokens
        self.training_set = cache.split("train", random_flip=config.random_flip, config=config, caption_tokens=tokens)
        if "validation" in cache.splits:
            self.validation_set = cache.split("validation", caption_tokens=tokens)
        if config.aspect_buckets:
            self.tell_sizes()
        return cache.id2label if config.with_labels else {}

    def inputs(self) -> dict[str, str]:
        found = {**super().inputs(), "vae": vae_fingerprint(self.vae)}
        if self.lora is not None:
            found["base_model"] = self.lora.fingerprint
        if self.cache is not None:
            found["latent_cache"] = self.cache.fingerprint
        if self.tokens is not None:
            found["tokenizer"] = tokenizer_fingerprint(self.tokens.tokenizer)
        if self.text_encoder is not None and self.config.pretrained_text_encoder:
            found["text_encoder"] = module_fingerprint(self.text_encoder)
        return found

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        losses, _ = self.phase.losses(batch, draws, dropout=0.0, sampling="uniform")
        return loss_sums(losses) | noise_level_sums(losses, draws)

    def previews(self, exchange: Exchange) -> Previews:
        def pixels(batch: Batch, rows: Sequence[int]) -> Tensor:
            return batch_images(self.vae, batch, Draws(0, "previews", rows, self.context.device))

        conditions = {"captions": self.config.with_captions, "labels": self.config.with_labels}
        return prompted_previews(self, exchange, pixels, **conditions, id2label=self.id2label)

    def usage(self, model: str) -> str:
        batch = self.shown_batch(self.shown_rows(1))
        flags = {"model": model}
        if self.config.with_captions:
            flags["prompt"] = self.config.preview_prompts[0] if self.config.preview_prompts else batch["caption"][0]
        if self.config.with_labels:
            flags["class_label"] = self.id2label[int(batch["label"][0])]
        return command_with("pipelines/sample.py", {**flags, "output": "grid.png"})

    def pipeline(self):
        from pipelines.common.schedulers import sampling_scheduler
        from pipelines.latent_diffusion import LatentDiffusionPipeline

        tokens = self.tokens
        denoiser = self.phase.denoiser if self.lora is None else self.lora.fused(self.config.denoiser)
        return LatentDiffusionPipeline(
            vae=self.vae,
            **{"unet": None, self.config.denoiser: denoiser},
            scheduler=sampling_scheduler(self.diffusion.scheduler),
            text_encoder=self.text_encoder,
            tokenizer=tokens.tokenizer if tokens else None,
            id2label=self.id2label or None,
            max_text_length=tokens.max_length if tokens else None,
            caption_prior=self.phase.caption_prior,
        )

    def save_pipeline(self, folder: Path) -> None:
        super().save_pipeline(folder)
        if self.lora is not None:
            self.lora.save(folder)

    def card_facts(self) -> dict[str, Any]:
        return super().card_facts() if self.lora is None else {**super().card_facts(), **self.lora.card_facts()}


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET, complete=complete_latent_diffusion)
    return train(LatentDiffusionStage, config)


if __name__ == "__main__":
    entry_point(main)
