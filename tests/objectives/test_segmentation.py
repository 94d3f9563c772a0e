"""Per-pixel losses and metrics compared with values calculated by hand."""

from __future__ import annotations

import math

import pytest
import torch

from training.objectives.segmentation import (
    IGNORE_INDEX,
    class_areas,
    class_hits,
    dice_loss,
    mask_overlap,
    mean_class_accuracy,
    mean_iou,
    one_hot,
    pixel_accuracy,
    segmentation_cross_entropy,
)


def test_dice_is_zero_for_the_target_and_nearly_one_for_its_opposite():
    target = torch.zeros(1, 1, 10, 10)
    target[..., :5] = 1
    assert dice_loss(target, target).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(1 - target, target).item() == pytest.approx(1 - 1 / 101)  # no overlap, one smoothing pixel


def test_dice_of_a_half():
    """p = 1/2 everywhere against a full mask of n pixels: 1 - (2 n/2 + 1) / (n/4 + n + 1)."""
    target = torch.ones(1, 1, 4, 5)
    assert dice_loss(target / 2, target).item() == pytest.approx(1 - 21 / (5 + 20 + 1))


def test_a_correctly_predicted_empty_mask_has_zero_loss():
    empty = torch.zeros(2, 1, 8, 8)
    assert dice_loss(empty, empty).item() == 0


def test_mask_overlap_is_summed_over_the_batch():
    predicted = torch.tensor([[[True, True, False, False]]])
    target = torch.tensor([[[False, True, True, False]]])
    assert [int(x) for x in mask_overlap(predicted, target)] == [1, 3]


def test_class_hits_count_each_class_separately():
    target = torch.tensor([[0, 0, 0, 2], [2, 2, 5, 0]])
    predicted = torch.tensor([[0, 0, 1, 2], [2, 0, 5, 0]])
    hits, totals = class_hits(predicted, target, 6)
    assert hits.tolist() == [3, 0, 2, 0, 0, 1]
    assert totals.tolist() == [4, 0, 3, 0, 0, 1]
    assert mean_class_accuracy(hits.tolist(), totals.tolist()) == pytest.approx((3 / 4 + 2 / 3 + 1) / 3)
    assert math.isnan(mean_class_accuracy([0.0], [0.0]))


def test_one_hot_puts_the_classes_first():
    ids = torch.tensor([[[0, 2], [1, 1]]])
    assert one_hot(ids, 3).shape == (1, 3, 2, 2)
    assert torch.equal(one_hot(ids, 3).argmax(1), ids)


def test_areas_give_iou_and_accuracy_and_skip_unlabelled_pixels():
    target = torch.tensor([[0, 0, 0, 1], [1, 1, IGNORE_INDEX, IGNORE_INDEX]])
    predicted = torch.tensor([[0, 0, 1, 1], [1, 2, 0, 2]])
    areas = [area.tolist() for area in class_areas(predicted, target, 3)]
    assert areas == [[2, 2, 0], [3, 3, 0], [2, 3, 1]]
    # Class 0: union of 3 and 2 pixels with 2 in both; class 1: union of 3 and 3 with 2 in both. Class 2 does not occur
    # in the target and does not count.
    assert mean_iou(*areas) == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert pixel_accuracy(*areas[:2]) == pytest.approx(4 / 6)
    assert math.isnan(mean_iou([0.0], [0.0], [3.0]))
    assert math.isnan(pixel_accuracy([0.0], [0.0]))


def test_iou_is_computed_over_all_images_together():
    """Pixels are summed over images first: 1 of 2 and 6 of 6 pixels give 7 of 8, not the mean of 1/2 and 1."""
    first = class_areas(torch.tensor([0, 1]), torch.tensor([0, 0]), 2)
    second = class_areas(torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64), 2)
    assert mean_iou(*((a + b).tolist() for a, b in zip(first, second, strict=True))) == pytest.approx(7 / 8)


def test_cross_entropy_of_an_image_does_not_depend_on_the_others():
    logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 4, (3, 5, 6), generator=torch.Generator().manual_seed(1))
    target[1, :3] = IGNORE_INDEX
    target[2] = IGNORE_INDEX
    by_hand = -logits.log_softmax(1)
    first = by_hand[0].gather(0, target[:1]).mean()
    second = by_hand[1, :, 3:].gather(0, target[1:2, 3:]).mean()
    assert segmentation_cross_entropy(logits, target).item() == pytest.approx(((first + second) / 3).item())
    alone = [segmentation_cross_entropy(logits[i : i + 1], target[i : i + 1]).item() for i in range(3)]
    assert segmentation_cross_entropy(logits, target).item() == pytest.approx(sum(alone) / 3)


def test_unlabelled_pixels_get_no_gradient():
    logits = torch.zeros(1, 2, 2, 2, requires_grad=True)
    target = torch.tensor([[[0, 1], [IGNORE_INDEX, 1]]])
    segmentation_cross_entropy(logits, target).backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(1)[0]
    assert touched[1, 0] == 0
    assert (touched > 0).sum() == 3
