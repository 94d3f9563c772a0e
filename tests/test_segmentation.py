"""Per-pixel losses and metrics against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from training.segmentation import class_hits, dice_loss, mask_overlap, mean_class_accuracy, one_hot


def test_dice_is_nought_for_the_truth_and_nearly_one_for_its_opposite():
    target = torch.zeros(1, 1, 10, 10)
    target[..., :5] = 1
    assert dice_loss(target, target).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(1 - target, target).item() == pytest.approx(1 - 1 / 101)  # no overlap, one smoothing pixel


def test_dice_of_a_half():
    """p = 1/2 everywhere against a full mask of n pixels: 1 - (2 n/2 + 1) / (n/4 + n + 1)."""
    target = torch.ones(1, 1, 4, 5)
    assert dice_loss(target / 2, target).item() == pytest.approx(1 - 21 / (5 + 20 + 1))


def test_an_empty_mask_well_predicted_costs_nothing():
    empty = torch.zeros(2, 1, 8, 8)
    assert dice_loss(empty, empty).item() == 0


def test_masks_overlap_over_everything():
    predicted = torch.tensor([[[True, True, False, False]]])
    target = torch.tensor([[[False, True, True, False]]])
    assert [int(x) for x in mask_overlap(predicted, target)] == [1, 3]


def test_class_hits_count_each_class_apart():
    true = torch.tensor([[0, 0, 0, 2], [2, 2, 5, 0]])
    read = torch.tensor([[0, 0, 1, 2], [2, 0, 5, 0]])
    hits, totals = class_hits(read, true, 6)
    assert hits.tolist() == [3, 0, 2, 0, 0, 1]
    assert totals.tolist() == [4, 0, 3, 0, 0, 1]
    assert mean_class_accuracy(hits.tolist(), totals.tolist()) == pytest.approx((3 / 4 + 2 / 3 + 1) / 3)
    assert math.isnan(mean_class_accuracy([0.0], [0.0]))


def test_one_hot_puts_the_classes_first():
    ids = torch.tensor([[[0, 2], [1, 1]]])
    assert one_hot(ids, 3).shape == (1, 3, 2, 2)
    assert torch.equal(one_hot(ids, 3).argmax(1), ids)
