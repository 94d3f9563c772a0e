"""Losses and metrics of per-pixel prediction; pure functions.

Shapes: B pictures, K classes, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dice_loss(probabilities: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - 2 Σ p t / (Σ p² + Σ t²), mean over pictures and classes (Milletari, Navab and Ahmadi 2016, eq. 8).

    Args:
        probabilities, target: B K H W in [0, 1].
        smooth: pixels added above and below, so that an empty mask well predicted costs nothing.
    """
    p, t = probabilities.flatten(2), target.flatten(2)
    overlap, size = (p * t).sum(2), p.square().sum(2) + t.square().sum(2)
    return (1 - (2 * overlap + smooth) / (size + smooth)).mean()


def one_hot(classes: Tensor, num_classes: int) -> Tensor:
    """B H W of class ids → B K H W, float."""
    return F.one_hot(classes, num_classes).movedim(-1, 1).float()


def mask_overlap(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in both and pixels in either of two boolean masks, added up over everything: two int64 scalars."""
    return (predicted & target).sum(), (predicted | target).sum()


def class_hits(predicted: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """For every class: its pixels that were recognised, and all its pixels. Two int64 tensors K.

    Args:
        predicted, target: class ids of equal shape.
    """
    hit = torch.bincount(target[predicted == target].flatten(), minlength=num_classes)
    return hit, torch.bincount(target.flatten(), minlength=num_classes)


def mean_class_accuracy(hits: list[float], totals: list[float]) -> float:
    """Mean over the classes that occur of the share of their pixels that were recognised; NaN if none occurs."""
    shares = [hit / total for hit, total in zip(hits, totals, strict=True) if total]
    return sum(shares) / len(shares) if shares else float("nan")
