"""Objectives of pictures and captions in one latent space, as pure functions: no model, no I/O.

B pairs, D latent vector, L tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_losses(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each caption, summed over its tokens, and how many they are: `<START>` is given, not predicted.

    Args:
        logits: B L V, of the token after each one of `input_ids`.
        input_ids: B L. attention_mask: B L, 1 for tokens, 0 for padding, which is not counted whatever its id.

    Returns:
        Sums (B, float32) and counts (B).
    """
    counted = attention_mask[:, 1:].float()
    # Flat, because log_softmax over the last dimension is several times as fast as over one in the middle.
    said, true = logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten()
    losses = F.cross_entropy(said, true, reduction="none").view_as(counted)
    return (losses * counted).sum(1), counted.sum(1)


def contrastive_losses(image_latents: Tensor, caption_latents: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric InfoNCE (CLIP: Radford et al. 2021): which caption is this picture's, and the other way round. B.

    Args:
        image_latents, caption_latents: B D; row i of one belongs to row i of the other.
        scale: the inverse temperature that cosines are multiplied by.
        same: B B, bool: rows with one and the same caption or picture, which are no wrong answers and are left out.
    """
    images, captions = F.normalize(image_latents.float(), dim=1), F.normalize(caption_latents.float(), dim=1)
    # Autocast would round cosines to three digits, and `scale` is up to a hundred.
    with torch.autocast(images.device.type, enabled=False):
        logits = scale.float() * images @ captions.T
    others = same & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(others, float("-inf"))
    own = torch.arange(len(logits), device=logits.device)
    to_captions = F.cross_entropy(logits, own, reduction="none")
    to_images = F.cross_entropy(logits.T, own, reduction="none")
    return 0.5 * (to_captions + to_images)


def cosine_distances(image_latents: Tensor, caption_latents: Tensor) -> Tensor:
    """1 - cosine of each pair. B, in [0, 2]."""
    return 1 - F.cosine_similarity(image_latents.float(), caption_latents.float(), dim=1)


def same_captions(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Which rows are the same caption. B B, bool."""
    ids = input_ids.masked_fill(attention_mask == 0, -1)
    return (ids[:, None] == ids[None]).all(-1)


def same_images(pixel_values: Tensor) -> Tensor:
    """Which rows are the same picture, by two weighted sums of its numbers. B B, bool.

    Args:
        pixel_values: B 3 H W.
    """
    pixels = pixel_values.float().flatten(1)
    places = torch.arange(1, pixels.shape[1] + 1, device=pixels.device, dtype=torch.float32)
    # Sums along rows, not a product of matrices, which may add up one row in another order than the next.
    sums = torch.stack([(pixels * weights).sum(1) for weights in (places.sin(), places.cos())], dim=1)
    return (sums[:, None] == sums[None]).all(-1)


def with_unknown_words(input_ids: Tensor, attention_mask: Tensor, chosen: Tensor, unknown_token_id: int) -> Tensor:
    """Ids with `chosen` words read as unknown; a caption's first and last token and its padding stay. B L.

    Args:
        chosen: B M, bool, M at least L.
    """
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device)
    words = (places > 0) & (places < attention_mask.sum(1, keepdim=True) - 1)
    return input_ids.masked_fill(words & chosen[:, :length], unknown_token_id)


def scaled_errors(images: Tensor, references: Tensor, variance: Tensor) -> Tensor:
    """Mean squared error of each picture in units of the pictures' variance: 1 is what their mean would cost. B.

    Args:
        images, references: B 3 H W.
        variance: scalar, the mean over pixels.
    """
    return (images.float() - references.float()).square().flatten(1).mean(1) / variance
