"""The archive as images: a heat map of qualities, a wall of posters, and the courses of several searches as curves.

Archives of more than two measures are shown along the first two of them; a cell then shows the best poster of all that
share it. K cells along a measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipelines.tools.grids import image_grid

COLORS = ("#3b6fb6", "#d1495b", "#2e7d32", "#6d597a")
MOST_IN_WALL = 20
WALL_CELL = 96  # pixels


def seen_elites(elites: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], Mapping[str, Any]]:
    """Return the best poster of each cell along the first two measures; `elites` are in the order of their quality."""
    seen: dict[tuple[int, int], Mapping[str, Any]] = {}
    for elite in elites:
        seen.setdefault((elite["cell"][0], elite["cell"][1]), elite)
    return seen


def draw_heat_map(elites: Sequence[Mapping[str, Any]], cells: int, measures: Sequence[str]) -> Image.Image:
    """Draw the quality in each cell; empty cells are white.

    pyribs draws heat maps as well, but only of archives of two measures.
    """
    qualities = np.full((cells, cells), np.nan)
    for (column, row), elite in seen_elites(elites).items():
        qualities[row, column] = elite["quality"]
    figure = _figure(6.4, 5.4)
    axes = figure.add_subplot()
    shown = axes.imshow(qualities, origin="lower", extent=(0, 1, 0, 1), vmin=0, vmax=1, cmap="viridis")
    axes.set_xlabel(measures[0].replace("_", " "))
    axes.set_ylabel(measures[1].replace("_", " "))
    others = ", ".join(name.replace("_", " ") for name in measures[2:])
    axes.set_title(f"Quality of {len(elites):,} posters" + (f" (best over {others})" if others else ""))
    figure.colorbar(shown, label="quality")
    return _image(figure)


def draw_wall(
    elites: Sequence[Mapping[str, Any]], poster: Callable[[int], Image.Image], cells: int, measures: Sequence[str]
) -> Image.Image:
    """Draw the posters in their cells, with the lower bounds of the cells at the left and at the top.

    Rows and columns without posters are left out at the edges. Of a finer grid, cells are joined to at most
    `MOST_IN_WALL` along each side, which show their best poster.

    Args:
        poster: returns the poster of an evaluation.
    """
    side = min(cells, MOST_IN_WALL)
    best: dict[tuple[int, int], Mapping[str, Any]] = {}
    for (column, row), elite in seen_elites(elites).items():
        place = column * side // cells, row * side // cells
        if place not in best or elite["quality"] > best[place]["quality"]:
            best[place] = elite
    images = {place: poster(elite["evaluation"]) for place, elite in best.items()}
    blank = Image.new("RGB", next(iter(images.values())).size if images else (64, 64), "white")
    columns, rows = _occupied([place[0] for place in images]), _occupied([place[1] for place in images])[::-1]
    across, up = (name.replace("_", " ") for name in measures[:2])
    return image_grid(
        [images.get((column, row), blank) for row in rows for column in columns],
        columns=len(columns),
        column_titles=[f"{across} {column / side:.2f}" for column in columns],
        row_titles=[f"{up} {row / side:.2f}" for row in rows],
        cell=WALL_CELL,
    )


def _occupied(places: Sequence[int]) -> list[int]:
    """Return the places from the first to the last one that has a poster."""
    return list(range(min(places), max(places) + 1)) if places else [0]


def draw_comparison(courses: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> Image.Image:
    """Draw coverage and QD score over the number of evaluations: a thin line for each seed, a thick one for the mean.

    Args:
        courses: the history of each search, a list for each emitter.
    """
    figure = _figure(11, 4.2)
    for number, (column, title) in enumerate((("coverage", "Coverage"), ("qd_score", "QD score")), 1):
        axes = figure.add_subplot(1, 2, number)
        for color, (emitter, searches) in zip(COLORS, courses.items()):
            for history in searches:
                counts = [row["evaluations"] for row in history]
                axes.plot(counts, [row[column] for row in history], color=color, alpha=0.35, linewidth=0.9)
            common = min(map(len, searches))
            mean = np.mean([[row[column] for row in history[:common]] for history in searches], axis=0)
            counts = [row["evaluations"] for row in searches[0][:common]]
            axes.plot(counts, mean, color=color, linewidth=2.2, label=f"{emitter} ({len(searches)} seeds)")
        axes.set_title(title)
        axes.set_xlabel("posters evaluated")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="upper left")
    return _image(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _image(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
