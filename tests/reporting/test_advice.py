"""Warnings about training appear when they should, and only then."""

from __future__ import annotations

import dataclasses

import pytest

from training.reporting.advice import WINDOW_STEPS, Course, advice, too_long
from training.run.state import EpochSummary

# Four epochs are a window: 4 × 250 steps.
COURSE = Course(steps_per_epoch=250, goal_steps=5000, trivial_loss=1.0)


def history(losses, val_losses=None, learning_rate=1e-4):
    val_losses = val_losses or [None] * len(losses)
    return [EpochSummary(i, *pair, learning_rate) for i, pair in enumerate(zip(losses, val_losses, strict=True), 1)]


def warnings(*args, learning_rate=1e-4, **facts) -> str:
    return " ".join(advice(history(*args, learning_rate=learning_rate), dataclasses.replace(COURSE, **facts)))


def test_a_run_that_learns_is_left_alone():
    losses = [0.9 * 0.9**i for i in range(16)]
    for length in range(1, 17):
        assert warnings(losses[:length], losses[:length]) == ""


@pytest.mark.parametrize(
    ("loss", "learning_rate", "cause"),
    [(0.97, 1e-6, "learning rate is very low"), (3.0, 1e-3, "diverges"), (0.95, 1e-4, "too small for the data")],
)
def test_a_loss_still_high_names_the_likely_cause_once(loss, learning_rate, cause):
    assert cause in warnings([loss] * 4, learning_rate=learning_rate)
    assert "still" not in warnings([loss] * 3, learning_rate=learning_rate)
    assert "still" not in warnings([loss] * 5, learning_rate=learning_rate)


def test_what_is_high_depends_on_the_objective():
    assert "still" in warnings([1.8] * 4, trivial_loss=2.0)
    assert warnings([1.0] * 4, trivial_loss=2.0) == ""
    assert warnings([1.0] * 4, trivial_loss=None) == ""


def test_captions_are_a_cause_only_where_there_are_some():
    assert "captions that do not describe the images" in warnings([0.95] * 4, conditions=("captions", "classes"))
    assert "caption" not in warnings([0.95] * 4, conditions=("classes",))
    assert "caption" not in warnings([0.95] * 4)


def test_a_flat_and_a_rising_loss():
    assert "has been flat for 1,000 steps" in warnings([0.5] * 8)
    assert "rose over the last 1,000 steps" in warnings([0.5] * 4 + [0.6] * 4)
    assert warnings([0.5] * 7) == ""
    assert warnings([0.5] * 8, goal_steps=2000) == "", "at the end there is nothing to do about it"


@pytest.mark.parametrize(
    ("steps_per_epoch", "goal_steps", "epochs"),
    [(12, 5000, 84), (250, 5000, 4), (1000, 5000, 1), (25_000, 100_000, 1), (12, 60_000, 500), (250, 40_000, 16)],
)
def test_losses_are_averaged_over_a_number_of_steps(steps_per_epoch, goal_steps, epochs):
    """An epoch of 200 images is a dozen steps: over a few of them, the loss says nothing."""
    course = dataclasses.replace(COURSE, steps_per_epoch=steps_per_epoch, goal_steps=goal_steps)
    assert course.window == epochs
    assert course.window * steps_per_epoch >= WINDOW_STEPS
    assert advice(history([0.95] * (epochs - 1)), course) == []
    assert "still" in advice(history([0.95] * epochs), course)[0]


def test_the_warmup_does_not_count():
    facts = {"warmup_steps": 600}  # it ends in the third epoch
    assert warnings([0.95] * 4, **facts) == ""
    assert "1,000 steps after the warm-up" in warnings([0.95] * 7, **facts)
    assert warnings([5.0, 5.0, 5.0, *[0.5] * 4, *[0.4] * 4], **facts) == ""
    assert warnings([0.1, 0.1, 0.1, 0.4], [0.1, 0.1, 0.1, 0.7], **facts) == "", "a single epoch after the warm-up"


def test_a_gap_that_opens():
    training = [0.5, 0.4, 0.3, 0.2]
    assert "begins to memorize" in warnings(training, [0.5, 0.45, 0.45, 0.6])
    assert warnings(training, [0.5, 0.48, 0.46, 0.44]) == "", "a gap alone is normal: they are measured differently"
    assert warnings(training, [0.5, 0.45, 0.44, 0.29]) == ""


def test_an_open_gap_is_reported_once():
    training = [0.5, 0.4, 0.3, 0.2, 0.1]
    assert warnings(training, [0.5, 0.45, 0.5, 0.6, 0.7]) == ""
    assert "begins to memorize" in warnings([*training, 0.1, 0.1], [0.5, 0.45, 0.5, 0.6, 0.45, None, 0.7])


def test_a_run_of_days_with_far_too_many_steps_or_epochs():
    many_epochs = Course(steps_per_epoch=12, goal_steps=90_000)
    many_steps = Course(steps_per_epoch=10_000, goal_steps=400_000)
    assert "90,000 steps (7,500 epochs) takes 2.1 more days" in (too_long(0, 2.0, many_epochs) or "")
    assert "takes 3.5 more days; --max_train_steps" in (too_long(100_000, 1.0, many_steps) or "")
    assert too_long(0, 0.1, many_epochs) is None, "it takes hours"
    assert too_long(395_000, 1.0, many_steps) is None, "it will soon be over"
    assert too_long(0, 2.0, Course(steps_per_epoch=10_000, goal_steps=90_000)) is None, "neither many steps nor epochs"
