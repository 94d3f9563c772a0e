"""Objectives for images and captions in one latent space, as pure functions: no model, no I/O.

B pairs, D size of a latent vector, L tokens, V vocabulary size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_losses(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of each caption, summed over its tokens, and the number of these tokens.

    `<START>` is given rather than predicted, and is not counted.

    Args:
        logits: B L V, predictions of the token after each token of `input_ids`.
        input_ids: B L. attention_mask: B L, 1 for tokens and 0 for padding, which is not counted whatever its id.

    Returns:
        Sums (B, float32) and numbers of tokens (B).
    """
    counted = attention_mask[:, 1:].float()
    # Flattened, because log_softmax is several times faster over the last dimension than over one in the middle.
    predicted, target = logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten()
    losses = F.cross_entropy(predicted, target, reduction="none").view_as(counted)
    return (losses * counted).sum(1), counted.sum(1)


def contrastive_losses(image_latents: Tensor, caption_latents: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Compute the symmetric InfoNCE loss (CLIP: Radford et al. 2021) of matching images to captions and back. B.

    Args:
        image_latents, caption_latents: B D; row i of one belongs to row i of the other.
        scale: inverse temperature by which cosines are multiplied.
        same: B B, bool, pairs of rows with equal captions or equal images. They are left out, since they are not
            mismatched.
    """
    images, captions = F.normalize(image_latents.float(), dim=1), F.normalize(caption_latents.float(), dim=1)
    # Autocast would round cosines to three digits, which is too coarse because `scale` is up to a hundred.
    with torch.autocast(images.device.type, enabled=False):
        logits = scale.float() * images @ captions.T
    others = same & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(others, float("-inf"))
    own = torch.arange(len(logits), device=logits.device)
    to_captions = F.cross_entropy(logits, own, reduction="none")
    to_images = F.cross_entropy(logits.T, own, reduction="none")
    return 0.5 * (to_captions + to_images)


def cosine_distances(image_latents: Tensor, caption_latents: Tensor) -> Tensor:
    """Compute 1 - cosine of each pair. B, in [0, 2]."""
    return 1 - F.cosine_similarity(image_latents.float(), caption_latents.float(), dim=1)


def same_captions(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return which pairs of rows have the same caption. B B, bool."""
    ids = input_ids.masked_fill(attention_mask == 0, -1)
    return (ids[:, None] == ids[None]).all(-1)


def same_images(pixel_values: Tensor) -> Tensor:
    """Return which pairs of rows have the same image, by comparing two weighted sums of its values. B B, bool.

    Args:
        pixel_values: B 3 H W.
    """
    pixels = pixel_values.float().flatten(1)
    places = torch.arange(1, pixels.shape[1] + 1, device=pixels.device, dtype=torch.float32)
    # Sums along rows instead of a matrix product, which may add up the values of equal rows in different orders.
    sums = torch.stack([(pixels * weights).sum(1) for weights in (places.sin(), places.cos())], dim=1)
    return (sums[:, None] == sums[None]).all(-1)


def with_unknown_words(input_ids: Tensor, attention_mask: Tensor, chosen: Tensor, unknown_token_id: int) -> Tensor:
    """Replace `chosen` words by the unknown token, except a caption's first and last token and its padding. B L.

    Args:
        chosen: B M, bool, with M at least L.
    """
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device)
    words = (places > 0) & (places < attention_mask.sum(1, keepdim=True) - 1)
    return input_ids.masked_fill(words & chosen[:, :length], unknown_token_id)


def scaled_errors(images: Tensor, references: Tensor, variance: Tensor) -> Tensor:
    """Compute the mean squared error of each image divided by the images' variance; predicting their mean gives 1. B.

    Args:
        images, references: B 3 H W.
        variance: scalar, averaged over pixels.
    """
    return (images.float() - references.float()).square().flatten(1).mean(1) / variance
