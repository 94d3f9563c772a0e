"""Regression metrics (mean absolute error and R²) from sums that can be added over batches, and scatter plots.

Shapes: B samples, N numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from torch import Tensor


def regression_sums(predicted: Tensor, true: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Compute the sums from which MAE and R² of each of N numbers are calculated. predicted, true: B × N."""
    predicted, true = predicted.double(), true.double()
    parts = {
        "absolute": (predicted - true).abs().sum(0),
        "squared": (predicted - true).square().sum(0),
        "sum": true.sum(0),
        "squares": true.square().sum(0),
    }
    return {f"{name}_{part}": values[i] for part, values in parts.items() for i, name in enumerate(names)}


def regression_metrics(
    sums: Mapping[str, float], count: float, names: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """Compute (mean absolute error, R²) of each number from `regression_sums`.

    R² = 1 - Σ (ŷ - y)² / Σ (y - ȳ)²: 1 for perfect predictions, 0 for predicting the mean, NaN if y is constant.

    Args:
        names: name in the sums → name in the result.
    """
    metrics = {}
    for key, name in names.items():
        spread = sums[f"{key}_squares"] - sums[f"{key}_sum"] ** 2 / count
        r2 = 1 - sums[f"{key}_squared"] / spread if spread > 1e-12 else math.nan
        metrics[name] = (sums[f"{key}_absolute"] / count, r2)
    return metrics


def scatter_plots(true: np.ndarray, predicted: np.ndarray, names: Sequence[str], columns: int = 4) -> Image.Image:
    """Plot predicted (vertical) against true (horizontal) values, one panel per number. true, predicted: B × N."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.7 * columns, 2.8 * rows), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        x, y = true[:, number], predicted[:, number]
        spread = float(((x - x.mean()) ** 2).sum())
        r2 = 1 - float(((y - x) ** 2).sum()) / spread if spread > 1e-12 else math.nan
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
        axes.scatter(x, y, s=6, alpha=0.5, color="#3b6fb6", linewidths=0)
        axes.set_title(f"{name.replace('_', ' ')}  R² {r2:.2f}", fontsize=10, loc="left", fontweight="bold")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set_xlabel("true", fontsize=8)
        axes.set_ylabel("predicted", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
