"""Losses and metrics of per-pixel prediction; pure functions.

Shapes: B images, K classes, H W pixels. Class ids may be `IGNORE_INDEX` for unlabelled pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255
"""Class id of unlabelled pixels, as in most segmentation datasets; losses and metrics ignore these pixels."""


def dice_loss(probabilities: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Compute 1 - 2 Σ p t / (Σ p² + Σ t²), mean over images and classes (Milletari, Navab and Ahmadi 2016, eq. 8).

    Args:
        probabilities, target: B K H W in [0, 1].
        smooth: added to numerator and denominator, so that a correctly predicted empty mask has a loss of 0.
    """
    p, t = probabilities.flatten(2), target.flatten(2)
    overlap, size = (p * t).sum(2), p.square().sum(2) + t.square().sum(2)
    return (1 - (2 * overlap + smooth) / (size + smooth)).mean()


def one_hot(classes: Tensor, num_classes: int) -> Tensor:
    """Convert class ids B H W to one-hot vectors B K H W, float; ids beyond the classes give zeros."""
    # Not F.one_hot, which reads the ids to check them.
    return (classes[..., None] == torch.arange(num_classes, device=classes.device)).movedim(-1, 1).float()


def segmentation_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the mean cross-entropy of the labelled pixels of each image, averaged over images. A scalar.

    With a mean over all labelled pixels at once, the weight of an image would depend on the other images of its
    micro-batch. An image without labels counts as 0.

    Args:
        logits: B K H W.
        target: B H W class ids.
    """
    loss = F.cross_entropy(logits.float(), target, reduction="none", ignore_index=IGNORE_INDEX)
    labelled = (target != IGNORE_INDEX).flatten(1).sum(1)
    return (loss.flatten(1).sum(1) / labelled.clamp(min=1)).mean()


def mask_overlap(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Count the pixels in the intersection and in the union of two boolean masks, over the batch: int64 scalars."""
    return (predicted & target).sum(), (predicted | target).sum()


def class_hits(predicted: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Count true positives and target pixels per class: two int64 tensors K.

    Args:
        predicted, target: class ids of equal shape.
    """
    hit = torch.bincount(target[predicted == target].flatten(), minlength=num_classes)
    return hit, torch.bincount(target.flatten(), minlength=num_classes)


def mean_class_accuracy(hits: list[float], totals: list[float]) -> float:
    """Return the mean recall over the classes that occur in the target; NaN if none occurs."""
    shares = [hit / total for hit, total in zip(hits, totals, strict=True) if total]
    return sum(shares) / len(shares) if shares else float("nan")


def class_areas(predicted: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count true positives, target pixels and predicted pixels per class.

    The three int64 tensors K can be added up over batches; unlabelled pixels are not counted.

    Args:
        predicted, target: class ids of equal shape.
    """
    labelled = target != IGNORE_INDEX
    predicted, target = predicted[labelled], target[labelled]
    hit, total = class_hits(predicted, target, num_classes)
    return hit, total, torch.bincount(predicted, minlength=num_classes)


def mean_iou(hit: list[float], total: list[float], predicted: list[float]) -> float:
    """Return the mean of hit / (total + predicted - hit) over the classes that occur in the target; NaN if none does.

    Args:
        hit, total, predicted: true positives, target pixels and predicted pixels per class from `class_areas`, summed
            over all images.
    """
    shares = [h / (t + p - h) for h, t, p in zip(hit, total, predicted, strict=True) if t]
    return sum(shares) / len(shares) if shares else float("nan")


def pixel_accuracy(hit: list[float], total: list[float]) -> float:
    """Return the fraction of labelled pixels whose class is predicted correctly; NaN if there are none."""
    return sum(hit) / sum(total) if sum(total) else float("nan")
