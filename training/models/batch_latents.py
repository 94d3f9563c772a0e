"""A batch's latents, from its images or from a latent cache, and its images from either.

B batch, C h w latents, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.core.draws import Draws
from training.core.stage import Batch


def batch_latents(vae: nn.Module, batch: Batch, draws: Draws, shape: Sequence[int]) -> Tensor:
    """A batch's latents (B C h w), scaled: drawn from the posterior of its images, or of its cached moments.

    Args:
        shape: C, h, w.
    """
    from pipelines.common.latents import encode_latents, latents_from_moments

    noise = draws.normal("posterior", shape)
    with torch.no_grad():
        if "pixel_values" in batch:
            return encode_latents(vae, batch["pixel_values"], noise)
        return latents_from_moments(vae, batch["mean"], batch.get("logvar"), noise)


def batch_images(vae: nn.Module, batch: Batch, draws: Draws, shape: Sequence[int]) -> Tensor:
    """A batch's images (B 3 H W), decoded from its latents where they come from a cache. `shape`: C, h, w."""
    from pipelines.common.latents import decode_latents

    if "pixel_values" in batch:
        return batch["pixel_values"]
    return decode_latents(vae, batch_latents(vae, batch, draws, shape))
