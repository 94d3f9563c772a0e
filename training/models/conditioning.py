"""What a latent diffusion model is trained on: a batch's latents, and the U-Net's condition with some of it dropped.

B batch, C h w latents, L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.core.draws import Draws
from training.core.stage import Batch


def batch_latents(vae: nn.Module, batch: Batch, draws: Draws, shape: Sequence[int]) -> Tensor:
    """B C h w, scaled; from pictures or from cached moments, the posterior drawn anew each time. `shape`: C, h, w."""
    from pipelines.common.latents import encode_latents, latents_from_moments

    noise = draws.normal("posterior", shape)
    with torch.no_grad():
        if "pixel_values" in batch:
            return encode_latents(vae, batch["pixel_values"], noise)
        return latents_from_moments(vae, batch["mean"], batch.get("logvar"), noise)


def caption_and_class(
    unet: Any, text_encoder: nn.Module | None, empty_ids: Tensor | None, batch: Batch, dropped: Tensor
) -> dict[str, Tensor | None]:
    """The U-Net's arguments beside latents and timesteps.

    Args:
        empty_ids: token ids of the empty caption, 1 L, on the batch's device; None for a model without text.
        dropped: B, bool: samples that get the empty caption and the null class.
    """
    from pipelines.latent_diffusion import encode_captions, null_class

    # The stock U-Net wants the argument even where nothing attends to text.
    arguments: dict[str, Tensor | None] = {"encoder_hidden_states": None}
    if empty_ids is not None:
        input_ids = torch.where(dropped[:, None], empty_ids, batch["input_ids"])
        arguments["encoder_hidden_states"] = encode_captions(text_encoder, input_ids)
    if unet.config.num_class_embeds:
        arguments["class_labels"] = torch.where(dropped, null_class(unet), batch["label"])
    return arguments
