"""Learned loss weights: the terms of the paper, initial values, and values at convergence."""

from __future__ import annotations

import math

import pytest
import torch

from training.objectives.loss_weights import LearnedLossWeights, classification_term, regression_term


def test_the_terms_are_those_of_the_paper():
    """With variance v = exp(s): L / (2 v) + log(v) / 2 and L / v + log(v) / 2."""
    loss, s = torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    variance = math.exp(0.7)
    assert regression_term(loss, s).item() == pytest.approx(3 / (2 * variance) + math.log(variance) / 2)
    assert classification_term(loss, s).item() == pytest.approx(3 / variance + math.log(variance) / 2)


def test_initial_weights_are_the_given_ones():
    weights = LearnedLossWeights({"reconstruction": 1.0, "segmentation": 0.1}, regression=["reconstruction"])
    learned = {name: value.item() for name, value in weights.weights().items()}
    assert learned == pytest.approx({"reconstruction": 1.0, "segmentation": 0.1})
    losses = {
        name: torch.tensor(value, requires_grad=True)
        for name, value in (("reconstruction", 2.0), ("segmentation", 3.0))
    }
    weights(losses).backward()
    assert [loss.grad.item() for loss in losses.values()] == pytest.approx([1.0, 0.1])


def test_each_weight_learns_from_its_own_loss():
    """The derivative d/ds of a term is (1 - 2 w L) / 2, with w the current weight, for both kinds of terms."""
    weights = LearnedLossWeights({"reconstruction": 0.5, "a": 0.2, "b": 0.3}, regression=["reconstruction"])
    weights({"reconstruction": torch.tensor(2.0), "a": torch.tensor(4.0), "b": torch.tensor(0.0)}).backward()
    gradients = {name: s.grad.item() for name, s in weights.log_variances.items()}
    assert gradients == pytest.approx({"reconstruction": 0.5 - 0.5 * 2, "a": 0.5 - 0.2 * 4, "b": 0.5})


def test_a_weight_converges_to_the_inverse_of_its_loss():
    weights = LearnedLossWeights({"reconstruction": 1.0, "segmentation": 1.0}, regression=["reconstruction"])
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.05)
    losses = {"reconstruction": torch.tensor(0.02), "segmentation": torch.tensor(0.25)}
    for _ in range(600):
        optimizer.zero_grad()
        weights(losses).backward()
        optimizer.step()
    learned = {name: value.item() for name, value in weights.weights().items()}
    assert learned == pytest.approx({"reconstruction": 1 / (2 * 0.02), "segmentation": 1 / (2 * 0.25)}, rel=0.02)
