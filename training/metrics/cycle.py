"""The cycle score: generated posters are read, and compared with their own briefs and with shuffled briefs.

Shapes: N posters, one brief each; G grammar numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipelines.common.poster_domain import color_distance, rgb_color

SHUFFLES = 1000


def cycle_metrics(
    target: np.ndarray,
    read: np.ndarray,
    target_pictures: np.ndarray,
    read_pictures: np.ndarray,
    palette_distances: np.ndarray,
    seed: int = 0,
) -> dict[str, float]:
    """Compute how well posters agree with their briefs, in comparison with shuffled briefs.

    Args:
        target, read: grammar numbers (V_Grammar) of the briefs and as read from the posters, N × G.
        target_pictures, read_pictures: numbers of pictures, N.
        palette_distances: N × N, of poster i from the palette of brief j (see `palette_distance`).
        seed: seed of the shuffles.

    Returns:
        For each of grammar_correlation (Pearson's, mean over the G numbers), picture_count_share and palette_distance
        (RGB, 0 to 441): its value; `_shuffled`, its mean over shuffles of the briefs; `_standard_error`, its standard
        deviation over the shuffles, which is the variation by chance for N posters; and `_gain`, the improvement over
        `_shuffled` in units of `_standard_error`.
    """
    order = np.arange(len(target))
    scores: dict[str, tuple[Callable[[np.ndarray], float], float]] = {
        "grammar_correlation": (lambda rows: mean_correlation(target[rows], read), 1.0),
        "picture_count_share": (lambda rows: float((target_pictures[rows] == read_pictures).mean()), 1.0),
        "palette_distance": (lambda rows: float(palette_distances[order, rows].mean()), -1.0),
    }
    generator = np.random.default_rng(seed)
    shuffles = [generator.permutation(len(target)) for _ in range(SHUFFLES)]
    metrics: dict[str, float] = {}
    for name, (score, better) in scores.items():
        true, shuffled = score(order), np.array([score(rows) for rows in shuffles])
        spread = float(shuffled.std())
        gain = better * (true - float(shuffled.mean())) / spread if spread > 0 else 0.0
        metrics |= {
            name: true,
            f"{name}_shuffled": float(shuffled.mean()),
            f"{name}_standard_error": spread,
            f"{name}_gain": gain,
        }
    return metrics


def mean_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the mean Pearson correlation of the columns of two N × G arrays; a constant column counts as 0."""
    x, y = first - first.mean(0), second - second.mean(0)
    size = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    return float(np.divide((x * y).sum(0), size, out=np.zeros_like(size), where=size > 1e-12).mean())


def palette_distance(poster: np.ndarray, outside: np.ndarray, palette: Sequence[str]) -> float:
    """Compute the mean RGB distance of pixels from the nearest colour of `palette` and of these colours from the
    nearest pixel.

    Both directions count, so that a poster with only one colour of the palette does not score well.

    Args:
        poster: H × W × 3, uint8. outside: H × W, bool, the pixels that count (outside pictures).
        palette: colours as '#rrggbb'.
    """
    pixels = poster[outside] if outside.any() else poster.reshape(-1, 3)
    colors = np.array([rgb_color(code) for code in palette], dtype=np.float32)
    distances = color_distance(pixels[:, None].astype(np.float32), colors)
    return float((distances.min(1).mean() + distances.min(0).mean()) / 2)
