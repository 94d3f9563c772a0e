"""Losses and metrics of per-pixel prediction; pure functions.

Shapes: B pictures, K classes, H W pixels. Class ids may be `IGNORE_INDEX`, for pixels that nobody labelled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255
"""The class id of unlabelled pixels, as in most segmentation datasets: no loss and no metric counts them."""


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


def segmentation_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each picture's labelled pixels, averaged over them, then over the pictures. A scalar.

    A mean over all labelled pixels at once would make a picture's share hang on the others of its micro-batch. A
    picture without labels counts as 0.

    Args:
        logits: B K H W.
        target: B H W class ids.
    """
    loss = F.cross_entropy(logits.float(), target, reduction="none", ignore_index=IGNORE_INDEX)
    labelled = (target != IGNORE_INDEX).flatten(1).sum(1)
    return (loss.flatten(1).sum(1) / labelled.clamp(min=1)).mean()


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


def class_areas(predicted: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every class: the pixels that are it and were recognised, those that are it, those taken for it.

    Three int64 tensors K, which can be added up over batches; unlabelled pixels are in none.

    Args:
        predicted, target: class ids of equal shape.
    """
    labelled = target != IGNORE_INDEX
    predicted, target = predicted[labelled], target[labelled]
    hit, total = class_hits(predicted, target, num_classes)
    return hit, total, torch.bincount(predicted, minlength=num_classes)


def mean_iou(hit: list[float], total: list[float], taken: list[float]) -> float:
    """Mean of hit / (total + taken - hit) over the classes that occur in the true masks; NaN if none does.

    Args:
        hit, total, taken: areas by class, as `class_areas` gives them, summed over all pictures.
    """
    shares = [h / (t + p - h) for h, t, p in zip(hit, total, taken, strict=True) if t]
    return sum(shares) / len(shares) if shares else float("nan")


def pixel_accuracy(hit: list[float], total: list[float]) -> float:
    """Share of the labelled pixels that were recognised; NaN if there are none."""
    return sum(hit) / sum(total) if sum(total) else float("nan")
