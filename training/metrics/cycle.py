"""The cycle score: is a painted poster what its brief asked for? Read back, and held against shuffled briefs.

Shapes: N posters, one brief each; G grammar numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipelines.common.poster_domain import color_distance, rgb_color

SHUFFLES = 1000


def cycle_metrics(
    asked: np.ndarray,
    read: np.ndarray,
    asked_pictures: np.ndarray,
    read_pictures: np.ndarray,
    palette_distances: np.ndarray,
    seed: int = 0,
) -> dict[str, float]:
    """How well what was read agrees with what was asked, and with briefs dealt out at random.

    Args:
        asked, read: V_Grammar, N × G.
        asked_pictures, read_pictures: counts, N.
        palette_distances: N × N, of poster i from the palette of brief j (see `palette_distance`).
        seed: of the shuffles.

    Returns:
        For each of grammar_correlation (Pearson's, mean over the G numbers), picture_count_share and palette_distance
        (RGB, 0 to 441): the figure; `_shuffled`, its mean over shuffles of the briefs; `_standard_error`, their
        standard deviation, which is what chance alone does to N posters; `_gain`, by how many of those it is better.
    """
    order = np.arange(len(asked))
    scores: dict[str, tuple[Callable[[np.ndarray], float], float]] = {
        "grammar_correlation": (lambda rows: mean_correlation(asked[rows], read), 1.0),
        "picture_count_share": (lambda rows: float((asked_pictures[rows] == read_pictures).mean()), 1.0),
        "palette_distance": (lambda rows: float(palette_distances[order, rows].mean()), -1.0),
    }
    generator = np.random.default_rng(seed)
    shuffles = [generator.permutation(len(asked)) for _ in range(SHUFFLES)]
    figures: dict[str, float] = {}
    for name, (score, better) in scores.items():
        true, shuffled = score(order), np.array([score(rows) for rows in shuffles])
        spread = float(shuffled.std())
        gain = better * (true - float(shuffled.mean())) / spread if spread > 0 else 0.0
        figures |= {
            name: true,
            f"{name}_shuffled": float(shuffled.mean()),
            f"{name}_standard_error": spread,
            f"{name}_gain": gain,
        }
    return figures


def mean_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of each column of two N × G arrays, mean over the columns; a constant column counts 0."""
    x, y = first - first.mean(0), second - second.mean(0)
    size = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    return float(np.divide((x * y).sum(0), size, out=np.zeros_like(size), where=size > 1e-12).mean())


def palette_distance(poster: np.ndarray, outside: np.ndarray, palette: Sequence[str]) -> float:
    """Mean RGB distance of the pixels from the nearest colour of `palette`, and of the palette's colours from the
    nearest pixel: a poster of one asked colour alone is as far off as one of other colours.

    Args:
        poster: H × W × 3, uint8. outside: H × W, bool, the pixels that count (those of no picture).
        palette: '#rrggbb'.
    """
    pixels = poster[outside] if outside.any() else poster.reshape(-1, 3)
    colors = np.array([rgb_color(code) for code in palette], dtype=np.float32)
    distances = color_distance(pixels[:, None].astype(np.float32), colors)
    return float((distances.min(1).mean() + distances.min(0).mean()) / 2)
