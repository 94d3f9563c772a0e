"""Warnings about training appear when they should, and only then."""

from __future__ import annotations

import pytest

from training.reporting.advice import advice
from training.run.state import EpochSummary


def history(losses, val_losses=None, learning_rate=1e-4):
    val_losses = val_losses or [None] * len(losses)
    return [EpochSummary(i, *pair, learning_rate) for i, pair in enumerate(zip(losses, val_losses, strict=True), 1)]


def warnings(*args, trivial=1.0, final=20.0, **kwargs) -> str:
    return " ".join(advice(history(*args, **kwargs), trivial, final))


def test_a_run_that_learns_is_left_alone():
    losses = [0.9 * 0.9**i for i in range(16)]
    for length in range(1, 17):
        assert warnings(losses[:length], losses[:length]) == ""


@pytest.mark.parametrize(
    ("loss", "learning_rate", "cause"),
    [(0.97, 1e-6, "learning rate is very low"), (3.0, 1e-3, "diverges"), (0.95, 1e-4, "too few steps")],
)
def test_a_loss_still_high_names_the_likely_cause_once(loss, learning_rate, cause):
    assert cause in warnings([loss] * 3, learning_rate=learning_rate)
    assert "still" not in warnings([loss] * 2, learning_rate=learning_rate)
    assert "still" not in warnings([loss] * 4, learning_rate=learning_rate)


def test_what_is_high_depends_on_the_objective():
    assert "still" in warnings([1.8] * 3, trivial=2.0)
    assert warnings([1.0] * 3, trivial=2.0) == ""
    assert warnings([1.0] * 3, trivial=None) == ""


def test_a_flat_and_a_rising_loss():
    assert "has been flat" in warnings([0.5] * 8)
    assert "rose over the last" in warnings([0.5] * 4 + [0.6] * 4)
    assert warnings([0.5] * 7) == ""
    assert warnings([0.5] * 8, final=8.0) == "", "at the end there is nothing to do about it"


def test_a_gap_that_opens():
    training = [0.5, 0.4, 0.3, 0.2]
    assert "begins to memorize" in warnings(training, [0.5, 0.45, 0.5, 0.6])
    assert warnings(training, [0.5, 0.48, 0.46, 0.44]) == "", "a gap alone is normal: they are measured differently"
    assert warnings(training, [0.5, 0.45, 0.44, 0.29]) == ""
