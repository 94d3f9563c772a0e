"""MAE and R² from sums compared with their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.metrics.regression import regression_metrics, regression_sums, scatter_plots


def test_metrics_from_added_sums_equal_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(50, 2, generator=generator)
    predicted = true + 0.1 * torch.randn(50, 2, generator=generator)
    sums: dict[str, float] = {}
    for part in (slice(0, 7), slice(7, 50)):
        for name, value in regression_sums(predicted[part], true[part], ["a", "b"]).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    metrics = regression_metrics(sums, 50, {"a": "first", "b": "second"})
    for column, name in enumerate(("first", "second")):
        y, z = true[:, column].double(), predicted[:, column].double()
        r2 = 1 - (z - y).square().sum() / (y - y.mean()).square().sum()
        assert metrics[name] == pytest.approx(((z - y).abs().mean().item(), r2.item()))


def test_r2_of_perfect_and_mean_predictions_and_of_constant_targets():
    true = torch.tensor([[0.0], [1.0], [0.5]])
    perfect = {k: float(v) for k, v in regression_sums(true, true, ["x"]).items()}
    mean = {k: float(v) for k, v in regression_sums(torch.full((3, 1), 0.5), true, ["x"]).items()}
    assert regression_metrics(perfect, 3, {"x": "x"})["x"] == (0, 1)
    assert regression_metrics(mean, 3, {"x": "x"})["x"][1] == pytest.approx(0)
    flat = {k: float(v) for k, v in regression_sums(true, torch.full((3, 1), 0.25), ["x"]).items()}
    assert math.isnan(regression_metrics(flat, 3, {"x": "x"})["x"][1])


def test_scatter_plots_have_a_panel_per_number():
    image = scatter_plots(np.random.rand(30, 8), np.random.rand(30, 8), [f"number {i}" for i in range(8)])
    assert image.width > 2 * 500
    assert image.height > 2 * 250
    assert len(image.getcolors(maxcolors=100_000)) > 50
