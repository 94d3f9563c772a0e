"""The cycle score for cases with known values."""

from __future__ import annotations

import numpy as np
import pytest

from training.metrics.cycle import cycle_metrics, mean_correlation, palette_distance


def test_perfect_readings_score_one_with_a_large_gain():
    rng = np.random.default_rng(0)
    grammar, counts = rng.random((64, 8)), rng.integers(0, 4, 64)
    distances = rng.uniform(50, 100, (64, 64))
    np.fill_diagonal(distances, 5)
    metrics = cycle_metrics(grammar, grammar, counts, counts, distances)
    assert metrics["grammar_correlation"] == pytest.approx(1)
    assert metrics["picture_count_share"] == 1
    assert metrics["palette_distance"] == 5
    names = ("grammar_correlation", "picture_count_share", "palette_distance")
    assert all(metrics[f"{name}_gain"] > 5 for name in names)
    assert metrics["grammar_correlation_shuffled"] == pytest.approx(0, abs=0.01)
    # The mean of 8 independent correlations of 64 pairs has the standard deviation 1 / √(63 · 8).
    assert metrics["grammar_correlation_standard_error"] == pytest.approx(1 / np.sqrt(63 * 8), rel=0.1)


def test_random_readings_have_no_gain():
    rng = np.random.default_rng(1)
    metrics = cycle_metrics(
        rng.random((64, 8)), rng.random((64, 8)), rng.integers(0, 4, 64), rng.integers(0, 4, 64), rng.random((64, 64))
    )
    assert all(abs(value) < 4 for name, value in metrics.items() if name.endswith("_gain"))


def test_correlation_of_a_constant_counts_as_zero():
    x = np.stack([np.arange(5.0), np.ones(5)], 1)
    assert mean_correlation(x, x) == pytest.approx(0.5)
    assert mean_correlation(x, -x) == pytest.approx(-0.5)


def test_palette_distance_goes_both_ways():
    poster = np.zeros((4, 4, 3), dtype=np.uint8)
    everywhere = np.ones((4, 4), dtype=bool)
    assert palette_distance(poster, everywhere, ["#000000"]) == 0
    # White is in the palette but not on the poster: half of the mean distance of the two colours, 441.7 / 2.
    assert palette_distance(poster, everywhere, ["#000000", "#ffffff"]) == pytest.approx(np.sqrt(3) * 255 / 4)
    poster[:2] = 255
    assert palette_distance(poster, everywhere, ["#000000", "#ffffff"]) == 0
    assert palette_distance(poster, np.arange(16).reshape(4, 4) < 8, ["#ffffff"]) == 0
