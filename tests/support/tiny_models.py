"""Tiny components for tests of pipelines: real models, small enough to run in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from pipelines.common.schedulers import sampling_scheduler, training_scheduler
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.models.caption_prior import CaptionPrior
from pipelines.models.multi_head_autoencoder import MultiHeadAutoencoderKL

WORDS = ["<PAD>", "<START>", "<END>", "<UNK>", "a", "red", "blue", "poster", "of", "circles"]
TOKENS = 8  # length of a padded caption
TEXT_WIDTH = 16
TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<UNK>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<START> $A <END>", special_tokens=[("<START>", 1), ("<END>", 2)]
    )
    names = {"pad_token": "<PAD>", "bos_token": "<START>", "eos_token": "<END>", "unk_token": "<UNK>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=TOKENS, **names)


def tiny_text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config).eval()


def tiny_unet(
    text: bool = True, classes: int | None = None, in_channels: int = 4, condition_channels: int = 0
) -> UNet2DConditionModel:
    """Make a U-Net; `classes` is the number of classes without the null class, which is added."""
    torch.manual_seed(2)
    options: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
    }
    if not text:
        options = {
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
        }
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=in_channels + condition_channels,
        out_channels=in_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=None if classes is None else classes + 1,
        **options,
    ).eval()


def tiny_vae(patch_size: int | None = None) -> AutoencoderKL:
    """Make a VAE of Diffusers, or Halftone's multi-head autoencoder if `patch_size` is given."""
    torch.manual_seed(3)
    if patch_size is None:
        return AutoencoderKL(**TWO_LEVELS).eval()
    return MultiHeadAutoencoderKL(**TWO_LEVELS, patch_size=patch_size, force_upcast=False).eval()


def tiny_caption_prior() -> CaptionPrior:
    torch.manual_seed(4)
    return CaptionPrior(TEXT_WIDTH, 4, 4, 4, hidden_size=8).eval()


def tiny_pipeline(
    prediction_type: str = "epsilon",
    *,
    text: bool = True,
    classes: int | None = None,
    patch_size: int | None = None,
    prior: bool = False,
) -> LatentDiffusionPipeline:
    pipeline = LatentDiffusionPipeline(
        vae=tiny_vae(patch_size),
        unet=tiny_unet(text, classes, condition_channels=4 if prior else 0),
        scheduler=sampling_scheduler(training_scheduler(prediction_type)),
        text_encoder=tiny_text_encoder() if text else None,
        tokenizer=tiny_tokenizer() if text else None,
        id2label=None if classes is None else {i: f"kind {i}" for i in range(classes)},
        caption_prior=tiny_caption_prior() if prior else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def larger_pipeline() -> LatentDiffusionPipeline:
    """A model with four million parameters. It needs about 45 seconds of a core for 200 steps of 16 images, which is
    much longer than a person, or a test, needs to press a button."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        cross_attention_dim=TEXT_WIDTH, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    scheduler = sampling_scheduler(training_scheduler("epsilon"))
    return LatentDiffusionPipeline(tiny_vae(), unet, scheduler, tiny_text_encoder(), tiny_tokenizer())
