"""The cycle loss of the poster decoder: how far what a reader predicts of a poster is from the poster's brief.

All functions are differentiable with respect to what is read. A field that the brief leaves open does not count.

Shapes: B posters, G grammar numbers, N counts, H W pixels, P colours of a palette.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to squared colour distances, in [0, 1] per channel: the gradient of a root is infinite at 0.
SMALLEST_SQUARE = 1e-6


def mean_of_present(values: Tensor, present: Tensor) -> Tensor:
    """Return the mean of the values where `present` is true, and 0 if it is true nowhere."""
    weights = present.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1)


def grammar_loss(read: Tensor, asked: Tensor, present: Tensor) -> Tensor:
    """Compute the mean squared error of the grammar numbers, B G, both standardized; `present` is B G, bool."""
    return mean_of_present((read.float() - asked.float()).square(), present)


def counts_loss(logits: Sequence[Tensor], asked: Tensor, present: Tensor) -> Tensor:
    """Compute the mean cross-entropy of the counts.

    Args:
        logits: for each of the N counts, B × (largest count + 1).
        asked: B N, int64. present: B N, bool.
    """
    losses = [F.cross_entropy(own.float(), asked[:, i], reduction="none") for i, own in enumerate(logits)]
    return mean_of_present(torch.stack(losses, 1), present)


def palette_loss(pixels: Tensor, palette: Tensor, present: Tensor, counted: Tensor) -> Tensor:
    """Compute the mean distance of pixels from the nearest colour of the palette, and of its colours from the nearest
    pixel.

    It is the `palette_distance` of `training/metrics/cycle.py`, for colours from 0 to 1 instead of 0 to 255.

    Args:
        pixels: B 3 H W in [0, 1].
        palette: B P 3 in [0, 1]. present: B P, bool.
        counted: B H W, bool, the pixels that count; if there are none in a poster, all of them do.
    """
    counted = counted.flatten(1)
    counted = torch.where(counted.any(1, keepdim=True), counted, torch.ones_like(counted))
    colors = pixels.float().flatten(2).transpose(1, 2)
    differences = colors[:, :, None] - palette.float()[:, None]
    distances = (differences.square().sum(3) + SMALLEST_SQUARE).sqrt()  # B, pixels, P
    far = torch.full_like(distances, 2.0)  # above the largest distance of two colours, √3
    to_colors = torch.where(present[:, None], distances, far).amin(2)
    to_pixels = torch.where(counted[:, :, None], distances, far).amin(1)
    share = counted.to(distances.dtype)
    from_pixels = (to_colors * share).sum(1) / share.sum(1)
    asked = present.to(distances.dtype)
    from_colors = (to_pixels * asked).sum(1) / asked.sum(1).clamp(min=1)
    return mean_of_present((from_pixels + from_colors) / 2, present.any(1))
