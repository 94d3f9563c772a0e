"""A tiny pipeline of each kind that Halftone publishes, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from pipelines.autoencoder import AutoencoderPipeline
from pipelines.common.schedulers import training_scheduler
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.models.multi_head_autoencoder import MultiHeadAutoencoderKL
from tests.pipelines.test_layout_analysis import tiny_pipeline as tiny_layout_pipeline
from tests.pipelines.test_poster_decoder import tiny_decoder, tiny_transformer_decoder
from tests.support.tiny_captions import tiny_caption_pipeline
from tests.support.tiny_controlnets import PICTURE, controlled, tiny_controlled, tiny_controlled_decoder, tiny_net
from tests.support.tiny_models import TEXT_WIDTH, TWO_LEVELS, tiny_pipeline, tiny_unet, tiny_vae
from training.objectives.few_steps import few_step_scheduler


def tiny_vae_with_heads() -> ModelMixin:
    torch.manual_seed(3)
    options = {**TWO_LEVELS, "patch_size": 4, "force_upcast": False}
    return MultiHeadAutoencoderKL(**options, num_mask_classes=3, num_classes=2).eval()


def with_a_pretrained_text_encoder() -> LatentDiffusionPipeline:
    """A pipeline with the text encoder and the tokenizer of T5, as after `--pretrained_text_encoder`."""
    words = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁poster"]
    tokenizer = T5Tokenizer(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=2)
    torch.manual_seed(1)
    config = T5Config(vocab_size=20, d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    encoder = T5EncoderModel(config).eval()
    scheduler = training_scheduler("epsilon")
    return LatentDiffusionPipeline(tiny_vae(), tiny_unet(), scheduler, encoder, tokenizer, max_text_length=6)


def tiny_distilled() -> LatentDiffusionPipeline:
    """A model that samples in three steps without guidance, which its weights contain, as after distillation."""
    teacher = tiny_pipeline("flow_prediction", classes=2)
    parts = {**teacher.components, "scheduler": few_step_scheduler(teacher.scheduler, 3)}
    distilled = {"num_inference_steps": 3, "guidance_scale": 1.5}
    pipeline = LatentDiffusionPipeline(**parts, id2label=teacher.config.id2label, distilled=distilled)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_two_controlnets() -> Any:
    base = tiny_pipeline()
    return controlled(base, tiny_net(base, "film", seed=1), tiny_net(base, "add", PICTURE, seed=2))


PUBLISHED: dict[str, Callable[[], Any]] = {
    "captioned": tiny_pipeline,
    "labelled": lambda: tiny_pipeline(text=False, classes=3),
    "captioned_and_labelled": lambda: tiny_pipeline("flow_prediction", classes=2, patch_size=4, prior=True),
    "distilled": tiny_distilled,
    "unconditional": lambda: tiny_pipeline("v_prediction", text=False),
    "pretrained_text_encoder": with_a_pretrained_text_encoder,
    "autoencoder": lambda: AutoencoderPipeline(tiny_vae()),
    "autoencoder_heads": lambda: AutoencoderPipeline(tiny_vae_with_heads()),
    "controlnet": lambda: tiny_controlled("film"),
    "two_controlnets": with_two_controlnets,
    "poster_decoder": tiny_decoder,
    "poster_transformer": tiny_transformer_decoder,
    "poster_controlnet": lambda: tiny_controlled_decoder("gated"),
    "image_caption": tiny_caption_pipeline,
    "layout_encoder": lambda: tiny_layout_pipeline(abstractor=False),
    "layout_analysis": tiny_layout_pipeline,
}
