"""Warnings about the course of training, computed from the history of its epochs. Pure functions.

What an epoch says depends on its number of steps: with 200 images, an epoch is a dozen steps, and with a million images
it is ten thousands. Losses are therefore compared over a number of steps, counted from the end of the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from training.run.state import EpochSummary

# Steps after the warm-up over which losses are averaged, at least; longer runs average over a tenth of their steps.
WINDOW_STEPS, WINDOW_SHARE = 1000, 0.1
FLAT_SHARE = 0.002
RISING_SHARE = 0.02
HIGH_SHARE = 0.85
GAP_RATIO = 1.5
LONG_STEPS, LONG_EPOCHS, LONG_DAYS = 100_000, 500, 1.0


@dataclass(frozen=True)
class Course:
    """The facts about a run that the advice depends on, besides its losses.

    Attributes:
        trivial_loss: the loss of a model that has learned nothing; None where it is not known.
        conditions: what images are generated from, as in `Stage.conditions`.
    """

    steps_per_epoch: int
    goal_steps: int
    warmup_steps: int = 0
    trivial_loss: float | None = None
    conditions: Sequence[str] = ()

    @property
    def window(self) -> int:
        """Number of epochs over which losses are averaged."""
        return math.ceil(max(WINDOW_STEPS, WINDOW_SHARE * self.goal_steps) / self.steps_per_epoch)

    @property
    def first_epoch(self) -> int:
        """The first epoch (from 1) that begins after the warm-up."""
        return math.ceil(self.warmup_steps / self.steps_per_epoch) + 1


def advice(history: Sequence[EpochSummary], course: Course) -> list[str]:
    """Return warnings about the newest epoch of `history`, each with what to do about it; usually none.

    Args:
        history: the epochs so far, in order.
    """
    warm = [epoch for epoch in history if epoch.epoch >= course.first_epoch]
    warnings = [_still_high(warm, course), _flat_or_rising(warm, course), _gap(warm)]
    return [warning for warning in warnings if warning]


def _still_high(history: Sequence[EpochSummary], course: Course) -> str | None:
    trivial_loss = course.trivial_loss
    if trivial_loss is None or len(history) != course.window:
        return None
    loss, learning_rate = _mean_loss(history), history[-1].learning_rate
    if loss < HIGH_SHARE * trivial_loss:
        return None
    if learning_rate < 3e-5:
        cause = f"the learning rate is very low ({learning_rate:.1e}); try --learning_rate 1e-4 to 1e-3"
    elif loss > 1.2 * trivial_loss:
        cause = (
            "training diverges, or the latents do not have unit variance; lower --learning_rate, and check that --vae "
            "is the autoencoder that the latents were computed with"
        )
    else:
        unfit = ", or captions that do not describe the images" if "captions" in course.conditions else ""
        cause = f"a learning rate that is too low, a model that is too small for the data{unfit}"
    return (
        f"the loss is still {loss:.3f}, {_steps(len(history), course)} after the warm-up; "
        f"a model that has learned nothing has a loss of about {trivial_loss:.1f}. Likely cause: {cause}"
    )


def _flat_or_rising(history: Sequence[EpochSummary], course: Course) -> str | None:
    window = course.window
    ended = bool(history) and history[-1].epoch * course.steps_per_epoch >= course.goal_steps
    if len(history) < 2 * window or len(history) % window or ended:
        return None
    recent, before = _mean_loss(history[-window:]), _mean_loss(history[-2 * window : -window])
    if recent > before * (1 + RISING_SHARE):
        return (
            f"the training loss rose over the last {_steps(window, course)} ({before:.4f} → {recent:.4f}); "
            "lower --learning_rate, or resume from the best checkpoint with --resume_from_checkpoint best"
        )
    if recent > before * (1 - FLAT_SHARE):
        return (
            f"the training loss has been flat for {_steps(window, course)} ({before:.4f} → {recent:.4f}); a decaying "
            "learning rate (--lr_scheduler cosine) or a larger model may lower it, more steps alone will not"
        )
    return None


def _gap(history: Sequence[EpochSummary]) -> str | None:
    """Warn once when a gap opens, and again only if it has closed in between: it is measured after each validation."""
    if not _gap_is_open(history):
        return None
    validated = [number for number, epoch in enumerate(history) if epoch.val_loss is not None]
    if len(validated) > 1 and _gap_is_open(history[: validated[-2] + 1]):
        return None
    last, best = history[-1], min(e.val_loss for e in history if e.val_loss is not None)
    return (
        f"the validation loss ({last.val_loss:.4f}; best {best:.4f}) moves away from the training loss "
        f"({last.loss:.4f}): the model begins to memorize its training data. Use more images, --random_flip, a "
        "smaller model or --early_stopping_patience; the checkpoint `best` keeps the best weights"
    )


def _gap_is_open(history: Sequence[EpochSummary]) -> bool:
    if len(history) < 2 or history[-1].val_loss is None:
        return False
    last = history[-1]
    best = min(e.val_loss for e in history if e.val_loss is not None)
    # The two are measured on different timesteps and weights, so a fixed gap is normal; a growing one is not.
    return last.val_loss > GAP_RATIO * last.loss and last.val_loss > 1.1 * best  # type: ignore[operator]


def too_long(step: int, seconds_per_step: float, course: Course) -> str | None:
    """Return a warning if a run will take days and has far more steps or epochs than most runs need.

    Args:
        step: number of steps done.
        seconds_per_step: the mean so far.
    """
    days = (course.goal_steps - step) * seconds_per_step / 86400
    epochs = course.goal_steps / course.steps_per_epoch
    if days <= LONG_DAYS or (course.goal_steps <= LONG_STEPS and epochs <= LONG_EPOCHS):
        return None
    return (
        f"at {seconds_per_step:.2g} seconds per step, this run of {course.goal_steps:,} steps ({epochs:,.0f} epochs) "
        f"takes {days:.1f} more days; --max_train_steps or --max_train_minutes shortens it, and "
        "--early_stopping_patience 5 ends it when validation no longer improves"
    )


def _mean_loss(epochs: Sequence[EpochSummary]) -> float:
    return sum(epoch.loss for epoch in epochs) / len(epochs)


def _steps(epochs: int, course: Course) -> str:
    return f"{epochs * course.steps_per_epoch:,} steps"
