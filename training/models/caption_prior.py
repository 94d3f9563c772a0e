"""Training of the caption prior: its settings, and the regression that warms it up.

Shapes: N captions, L tokens, C latent channels, h w latent cells.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.options import Options, option
from training.core.stage import Batch, MapDataset
from training.data.fingerprints import evenly_spaced

logger = logging.getLogger("halftone")

WARMUP_LEARNING_RATE = 2e-3  # the peak, from which the rate falls linearly to 0
RAMP_STEPS = 20  # in which the rate rises to the peak


@dataclass
class CaptionPriorConfig(Options):
    """The network that predicts latents from the caption alone (pipelines/models/caption_prior.py)."""

    hidden_size: int = option(0, at_least=0)
    """Width of the hidden layers; 0 trains without a caption prior"""
    dropout: float = option(0.1, at_least=0, below=1)
    """Dropout probability in the hidden layers"""
    weight: float = option(1.0, at_least=0)
    """Weight of the prior's squared error in the loss"""
    warmup_steps: int = option(250, at_least=0)
    """Number of steps to pretrain the prior (caption → latents, squared error) and, unless frozen, the text encoder,
    before training; not counted in --max_train_steps; 0 disables it"""
    warmup_batch_size: int = option(64, at_least=1)
    """Batch size of the prior's pretraining"""
    warmup_samples: int = option(2048, at_least=1)
    """Number of training images used for the prior's pretraining"""


def build_caption_prior(config: CaptionPriorConfig, text_width: int, latent_shape: tuple[int, int, int]) -> nn.Module:
    """Build a CaptionPrior with new weights. `text_width`: width of the text states; `latent_shape`: C, h, w."""
    from pipelines.models.caption_prior import CaptionPrior

    return CaptionPrior(text_width, *latent_shape, hidden_size=config.hidden_size, dropout=config.dropout)


def regression_samples(
    data: MapDataset, latents: Callable[[Batch, Draws], Tensor], config: CaptionPriorConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """Return token ids (N L) and latents (N C h w) of evenly spaced rows of `data`, as `warm_up` takes them.

    Args:
        latents: function that returns a batch's latents, B C h w.
    """
    input_ids: list[Tensor] = []
    targets: list[Tensor] = []
    sampled = evenly_spaced(len(data), config.warmup_samples)
    for start in range(0, len(sampled), config.warmup_batch_size):
        rows = sampled[start : start + config.warmup_batch_size]
        batch = fetch(data, [SampleKey(row, 0) for row in rows])
        input_ids.append(batch["input_ids"])
        targets.append(latents(batch, Draws(seed, 0, rows)))
    return torch.cat(input_ids), torch.cat(targets)


def warm_up(
    prior: nn.Module, text_encoder: Any, input_ids: Tensor, latents: Tensor, config: CaptionPriorConfig, seed: int
) -> None:
    """Train `prior` in place to predict `latents` (N C h w, scaled) from captions (`input_ids`, N L).

    The same `seed` gives the same weights. Parameters of the text encoder that require gradients are trained as well,
    so that it distinguishes words from the diffusion model's first step on.
    """
    from pipelines.latent_diffusion import encode_captions

    started = time.monotonic()
    parameters = [p for module in (prior, text_encoder) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=WARMUP_LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(seed)
    was_training = prior.training
    prior.train()
    first = last = None
    for step in range(config.warmup_steps):
        rate = WARMUP_LEARNING_RATE * min(1.0, (step + 1) / RAMP_STEPS) * (1 - step / config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(latents), (config.warmup_batch_size,), generator=generator)
        loss = (prior(encode_captions(text_encoder, input_ids[rows])) - latents[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        first, last = first if first is not None else loss.item(), loss
    prior.train(was_training)
    if first is not None and last is not None:
        seconds = time.monotonic() - started
        logger.info("caption prior warmed up: squared error %.2f → %.2f in %.0f s", first, last.item(), seconds)
