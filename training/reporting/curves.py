"""Training curves: the metrics.csv of a run as one image.

The columns are those of the run folder's metrics.csv (`step`, `loss` or `<phase>_loss`, `val_*`, `learning_rate`,
`grad_norm`, ...); any column may be missing, and any cell may be blank. Matplotlib is used through its object
interface, so that no window opens and the backend of the surrounding program stays as it is.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from training.core.previews import save_png
from training.reporting.groups import NOISE_LEVELS, group_of

Series = tuple[list[float], list[float]]  # steps, values: finite, sorted by step, one value per step

TRAIN_COLOR, VALIDATION_COLOR, BEST_COLOR = "#3b6fb6", "#d1495b", "#2e7d32"
OTHER_COLORS = ("#6d597a", "#e09f3e", "#2a9d8f", "#7f5539", "#577590", "#b5179e")
PANEL_INCHES = (5.6, 3.3)
MAX_OTHER_PANELS = 8
# A validation metric with one of these words in its name is better when it is higher; any other, when it is lower.
HIGHER_IS_BETTER = ("psnr", "ssim", "accuracy", "iou", "recall", "precision", "share", "score", "bleu", "f1", "dice")
Panel = Callable[[Any], None]


def draw_training_curves(
    csv_path: str | os.PathLike[str], png_path: str | os.PathLike[str], title: str = ""
) -> Path | None:
    """Draw the metrics.csv of a run as a PNG file, which is written atomically.

    The panels show the losses (every row in a light colour, smoothed values in a dark one, validation as points with
    the best one marked), the validation loss by noise level, each other validation metric, the learning rate, and the
    gradient norm.

    Returns:
        The path of the PNG file; None if metrics.csv has nothing to draw (absent, empty, damaged or without numbers).
    """
    columns = read_metrics(csv_path)
    panels = _panels(columns)
    if not panels:
        return None
    return save_png(_draw(panels, title), png_path)


def read_metrics(csv_path: str | os.PathLike[str]) -> dict[str, Series]:
    """Read the numeric columns of metrics.csv, by name.

    Rows without a step and cells without a finite number are left out. If a step occurs twice, because a resumed run
    repeats it, the later row is used. A row that was cut short by a crash contributes the cells that it has.
    """
    points: dict[str, dict[float, float]] = {}
    try:
        with open(csv_path, newline="", encoding="utf-8-sig", errors="replace") as file:
            for row in csv.DictReader(line.replace("\0", "") for line in file):
                step = _number(row.get("step"))
                for name, text in row.items():
                    value = _number(text)
                    if step is not None and value is not None and name and name != "step":
                        points.setdefault(name, {})[step] = value
    except (OSError, csv.Error):
        return {}  # the file does not exist yet or is damaged: training continues without curves
    series = {}
    for name, values in points.items():
        steps = sorted(values)
        series[name] = (steps, [values[step] for step in steps])
    return series


def smooth(values: Sequence[float], radius: int) -> list[float]:
    """Return the moving average of `values` over a window of `radius` values on either side (fewer near the ends).

    The window is centred because an exponential average lags behind: while a loss falls fast, it runs visibly above
    every point.
    """
    sums = [0.0, *accumulate(values)]
    windows = ((max(0, i - radius), min(len(values), i + radius + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def _panels(columns: dict[str, Series]) -> list[Panel]:
    losses = [name for name in columns if name == "loss" or (name.endswith("_loss") and not name.startswith("val_"))]
    panels: list[Panel] = []
    for name in losses:
        panels.append(_loss_panel(name, columns[name], columns.get(f"val_{name}")))
    drawn = {f"val_{name}" for name in losses}
    if bands := {name: series for name, series in columns.items() if group_of(name) == NOISE_LEVELS}:
        panels.append(_noise_panel(bands))
    others = [name for name in columns if name.startswith("val_") and name not in drawn | bands.keys()]
    for name, color in zip(others[:MAX_OTHER_PANELS], OTHER_COLORS * 2):
        panels.append(_line_panel(name, columns[name], color, mark_best=True))
    if "learning_rate" in columns:
        panels.append(_line_panel("learning_rate", columns["learning_rate"], "#555555"))
    if "grad_norm" in columns:
        panels.append(_norm_panel(columns["grad_norm"]))
    return panels


def _loss_panel(name: str, train: Series, validation: Series | None) -> Panel:
    def draw(axes: Any) -> None:
        _raw_and_smoothed(axes, train, TRAIN_COLOR, "training")
        if validation:
            axes.plot(*validation, "o-", color=VALIDATION_COLOR, markersize=4, linewidth=1.2, label="validation")
            _mark_best(axes, validation, higher=False)
        _name(axes, _words(name))
        axes.legend(frameon=False, fontsize=8)

    return draw


def _noise_panel(bands: dict[str, Series]) -> Panel:
    def draw(axes: Any) -> None:
        for (name, series), color in zip(bands.items(), OTHER_COLORS):
            low, high = name.split("_")[-2:]
            axes.plot(*series, "o-", color=color, markersize=3, linewidth=1.4, label=f"{low} to {high} % noise")
        if _spans_magnitudes([value for _, values in bands.values() for value in values]):
            axes.set_yscale("log")
        _name(axes, "loss by noise level (validation)")
        axes.legend(frameon=False, fontsize=8)

    return draw


def _norm_panel(series: Series) -> Panel:
    def draw(axes: Any) -> None:
        _raw_and_smoothed(axes, series, "#8a8a8a", "gradient norm")
        _name(axes, "gradient norm")

    return draw


def _line_panel(name: str, series: Series, color: str, mark_best: bool = False) -> Panel:
    def draw(axes: Any) -> None:
        marker = "o-" if len(series[0]) < 60 else "-"
        axes.plot(*series, marker, color=color, markersize=4, linewidth=1.4)
        if mark_best:
            _mark_best(axes, series, higher=any(word in name for word in HIGHER_IS_BETTER))
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.yaxis.set_major_formatter("{x:g}")  # 1e-05; an offset label would overlap the title
        _name(axes, _words(name))

    return draw


def _raw_and_smoothed(axes: Any, series: Series, color: str, label: str) -> None:
    steps, values = series
    logarithmic = _spans_magnitudes(values)
    if logarithmic:
        axes.set_yscale("log")
    if len(values) < 20:  # too few values for a meaningful average
        axes.plot(steps, values, "o-", color=color, markersize=3, linewidth=1.4, label=label)
        return
    radius = max(2, len(values) // 40)  # a window of a twentieth of the run, however long it is
    averaged = smooth([math.log(value) for value in values] if logarithmic else values, radius)
    averaged = [math.exp(value) for value in averaged] if logarithmic else averaged
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, averaged, color=color, linewidth=1.8, label=f"{label} (smoothed)")
    if not logarithmic:
        _cut_outliers(axes, values, averaged)


def _spans_magnitudes(values: Sequence[float]) -> bool:
    """Return whether the values are positive and span more than a factor of 20, not counting a few outliers."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 50], ordered[-1 - len(ordered) // 50]
    return ordered[0] > 0 and high / low > 20


def _cut_outliers(axes: Any, values: Sequence[float], averaged: Sequence[float]) -> None:
    """Limit the axis so that single outliers do not flatten the rest of the curve."""
    ordered = sorted(values)
    low, high = ordered[0], max(ordered[int(0.99 * (len(ordered) - 1))], *averaged)
    if ordered[-1] > high + (high - low) > high:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _name(axes: Any, words: str) -> None:
    axes.set_title(words, fontsize=11, loc="left", fontweight="bold")


def _mark_best(axes: Any, series: Series, higher: bool) -> None:
    steps, values = series
    best = max(values) if higher else min(values)
    step = steps[values.index(best)]
    label = f"best {best:.4g} at step {step:,.0f}"
    axes.plot([step], [best], "*", color=BEST_COLOR, markersize=12, markeredgecolor="white", zorder=5, label=label)


def _draw(panels: list[Panel], title: str) -> Image.Image:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 4 else 3
    rows = math.ceil(len(panels) / columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + (0.4 if title else 0))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        panel(axes)
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=8)
        axes.grid(True, color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=13)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _words(name: str) -> str:
    name = name.removeprefix("val_") + " (validation)" if name.startswith("val_") else name
    return name.replace("_", " ")


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
