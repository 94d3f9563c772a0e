"""The latents and the images of a batch, which holds either images or moments from a latent cache.

B batch, C h w latents, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.core.draws import Draws
from training.core.stage import Batch


def batch_latents(vae: nn.Module, batch: Batch, draws: Draws) -> Tensor:
    """Return a batch's scaled latents (B C h w), drawn from the posterior of its images or of its cached moments."""
    from pipelines.common.latents import encode_latents, latent_shape, latents_from_moments

    pixels = batch.get("pixel_values")
    shape = batch["mean"].shape[1:] if pixels is None else latent_shape(vae, *pixels.shape[-2:])
    noise = draws.normal("posterior", shape)
    with torch.no_grad():
        if "pixel_values" in batch:
            return encode_latents(vae, batch["pixel_values"], noise)
        return latents_from_moments(vae, batch["mean"], batch.get("logvar"), noise)


def batch_images(vae: nn.Module, batch: Batch, draws: Draws) -> Tensor:
    """Return a batch's images (B 3 H W); those of a batch from a latent cache are decoded."""
    from pipelines.common.latents import decode_latents

    if "pixel_values" in batch:
        return batch["pixel_values"]
    return decode_latents(vae, batch_latents(vae, batch, draws))
