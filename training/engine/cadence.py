"""When a run logs, validates, previews and saves.

The user gives a period in steps, in epochs, or both. If neither is given, the program chooses the period of validations
and previews from the length of the run, and checkpoints fall due by time only. Everything that is in metrics.csv falls
due by steps: its rows do not depend on the speed of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from training.core.options import Options, option

# The most validations, or previews, that the program plans for a run: one in 5 % of its steps.
MOST_EVENTS = 20
# In an epoch that is longer than this, the program plans several of them.
LONG_EPOCH_STEPS = 1000
# From this number on, events that are more frequent than those that the program plans are worth a warning.
MANY_EVENTS = 50


@dataclass
class CadenceConfig(Options):
    """How often a run logs, validates, shows previews and saves."""

    help_group = "Saving and measuring"

    logging_steps: int = option(10, on_resume="warn", at_least=1)
    """Write a row to metrics.csv every N optimizer steps, and at the end of each epoch"""
    validation_epochs: int | None = option(None, on_resume="warn", at_least=0, kept=True)
    """Validate every N epochs; 0 disables it. A run always ends with a validation. If neither this nor
    --validation_steps is set: about once per epoch, and at most 20 times in a run"""
    validation_steps: int | None = option(None, on_resume="warn", at_least=0, kept=True)
    """Validate every N optimizer steps, in addition to --validation_epochs if that is set; 0 disables it"""
    evaluation_epochs: int = option(0, on_resume="warn", at_least=0, essential=True)
    """Measure generated images every N epochs: their distance from real ones, and copies of training images; 0 disables
    it. If it is on, a run also ends with a measurement"""
    evaluation_steps: int = option(0, on_resume="warn", at_least=0)
    """Measure generated images every N optimizer steps, in addition to --evaluation_epochs; 0 disables it"""
    memorization_epochs: int = option(0, on_resume="warn", at_least=0)
    """Search for copies of training images among generated ones every N epochs, in addition to the measurements of
    --evaluation_epochs; 0 disables it. If it is on, a run also ends with a search"""
    preview_epochs: int | None = option(None, on_resume="free", at_least=0, kept=True)
    """Save previews every N epochs; 0 disables it. Previews are always saved at the end of a run. If neither this nor
    --preview_steps is set: about once per epoch, and at most 20 times in a run"""
    preview_steps: int | None = option(None, on_resume="free", at_least=0, kept=True)
    """Save previews every N optimizer steps, in addition to --preview_epochs if that is set; 0 disables it"""
    checkpointing_minutes: float = option(10.0, on_resume="free", at_least=0)
    """Save a checkpoint when N minutes have passed since the last one; 0 disables it. A checkpoint is also saved when
    the run is stopped, and at its end. The checkpoint of the best validation so far is kept in memory and saved with
    the next one, or in its place if that is due only by time; it is saved at once if it is larger than 1 GiB, or if no
    checkpoint falls due during the run"""
    checkpointing_epochs: int | None = option(None, on_resume="free", at_least=0, kept=True)
    """Save a checkpoint every N epochs, in addition to --checkpointing_minutes; 0 or unset disables it"""
    checkpointing_steps: int | None = option(None, on_resume="free", at_least=0, kept=True)
    """Save a checkpoint every N optimizer steps, in addition to --checkpointing_minutes; 0 or unset disables it"""


@dataclass(frozen=True)
class Period:
    """An event falls due `times` times in every `steps` steps, evenly spaced; the last time is after the last step."""

    steps: int
    times: int = 1

    def is_due(self, step: int) -> bool:
        """Return whether the event is due after `step` steps of the run."""
        return step * self.times // self.steps > (step - 1) * self.times // self.steps

    def due_steps(self, steps: int) -> set[int]:
        """Return the steps up to `steps` after which the event is due."""
        return {-(-number * self.steps // self.times) for number in range(1, steps * self.times // self.steps + 1)}


def automatic_period(total_steps: int, steps_per_epoch: int) -> Period:
    """Return the period of an event that falls due at most once in an epoch, or in LONG_EPOCH_STEPS steps of a longer
    one, and at most MOST_EVENTS times in a run of `total_steps`.

    Whole epochs are between two events, or several events in an epoch, so that epochs end with one of them: the tables
    and the advice compare epochs by their validations.
    """
    epochs = -(-total_steps // (MOST_EVENTS * steps_per_epoch))
    if epochs > 1:
        return Period(epochs * steps_per_epoch)
    fitting = MOST_EVENTS * steps_per_epoch // max(1, total_steps)
    return Period(steps_per_epoch, max(1, min(steps_per_epoch // LONG_EPOCH_STEPS, fitting)))


class Cadence:
    """Decides what is due after each step of a run.

    Args:
        total_steps: number of steps of the whole run.
    """

    def __init__(self, config: CadenceConfig, steps_per_epoch: int, total_steps: int):
        self.config, self.steps_per_epoch, self.total_steps = config, steps_per_epoch, total_steps
        automatic = automatic_period(total_steps, steps_per_epoch)
        self.validations = self._periods("validation", automatic)
        self.previews = self._periods("preview", automatic)
        self.checkpoints = self._periods("checkpointing", None)
        self.evaluations = self._periods("evaluation", None)
        self.copies = self._given(0, config.memorization_epochs)

    def _periods(self, event: str, automatic: Period | None) -> list[Period]:
        """Return the periods that the user gave for an event, or else the one that the program chose, if any."""
        steps, epochs = getattr(self.config, f"{event}_steps"), getattr(self.config, f"{event}_epochs")
        if steps is None and epochs is None:
            return [] if automatic is None else [automatic]
        return self._given(steps or 0, epochs or 0)

    def _given(self, steps: int, epochs: int) -> list[Period]:
        return [Period(period) for period in (steps, epochs * self.steps_per_epoch) if period > 0]

    @property
    def evaluates(self) -> bool:
        """Whether generated images are measured during the run."""
        return bool(self.evaluations)

    @property
    def searches_copies(self) -> bool:
        """Whether copies alone are searched for during the run."""
        return bool(self.copies)

    def validation_due(self, step: int) -> bool:
        return _is_due(self.validations, step)

    def evaluation_due(self, step: int) -> bool:
        return _is_due(self.evaluations, step)

    def copies_due(self, step: int) -> bool:
        return _is_due(self.copies, step)

    def preview_due(self, step: int) -> bool:
        return _is_due(self.previews, step)

    def checkpoint_due(self, step: int) -> bool:
        return _is_due(self.checkpoints, step)

    def anything_due(self, step: int) -> bool:
        """Return whether an event or a row of metrics is due after a step; the end of the run is not counted."""
        periods = (self.validations, self.evaluations, self.copies, self.previews, self.checkpoints)
        return self.row_due(step) or any(_is_due(kind, step) for kind in periods)

    def validation_steps(self) -> set[int]:
        """Return the steps of the run after which a validation is due; the one at its end is not counted."""
        return _due_steps(self.validations, self.total_steps)

    def evaluation_steps(self) -> set[int]:
        """Return the steps of the run after which generated images are measured, its last step included."""
        return _due_steps(self.evaluations, self.total_steps) | ({self.total_steps} if self.evaluates else set())

    def copies_steps(self) -> set[int]:
        """Return the steps of the run after which only copies are searched for, its last step included."""
        last = {self.total_steps} if self.searches_copies else set()
        return (_due_steps(self.copies, self.total_steps) | last) - self.evaluation_steps()

    def preview_steps(self) -> set[int]:
        """Return the steps of the run after which previews are due; those at its end are not counted."""
        return _due_steps(self.previews, self.total_steps)

    def checkpoint_steps(self) -> set[int]:
        """Return the steps of the run after which a checkpoint is due; those by time, and the last, are not counted."""
        return _due_steps(self.checkpoints, self.total_steps)

    def row_due(self, step: int) -> bool:
        return self.ends_epoch(step) or step % self.config.logging_steps == 0

    def ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def warnings(self) -> list[str]:
        """Return a warning for each event that the user asked for so often that it may take most of the time."""
        events = {
            "validation": self.validation_steps(),
            "evaluation": self.evaluation_steps(),
            "preview": self.preview_steps(),
            "checkpointing": self.checkpoint_steps(),
        }
        return [self._too_often(event, len(due)) for event, due in events.items() if len(due) > MANY_EVENTS]

    def _too_often(self, event: str, count: int) -> str:
        names = (f"{event}_steps", f"{event}_epochs")
        given = " ".join(f"--{name} {getattr(self.config, name)}" for name in names if getattr(self.config, name))
        fix = "a larger number saves time" + ("" if event == "evaluation" else ", and so does leaving it out")
        return f"{given} is due {count:,} times in this run of {self.total_steps:,} steps; {fix}"


def _is_due(periods: Iterable[Period], step: int) -> bool:
    return step > 0 and any(period.is_due(step) for period in periods)


def _due_steps(periods: Iterable[Period], steps: int) -> set[int]:
    return {step for period in periods for step in period.due_steps(steps)}


class CheckpointClock:
    """Tells when a checkpoint is due by time.

    Args:
        minutes: time between two checkpoints; 0 for none by time.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self._last = self._mark = time.monotonic()

    def mark(self) -> None:
        """Remember this moment, because a checkpoint of it is held in memory."""
        self._mark = time.monotonic()

    def restart(self, *, from_mark: bool = False) -> None:
        """Count the time from now on, or from `mark`, whose checkpoint has been written since."""
        self._last = self._mark if from_mark else time.monotonic()

    def is_due(self) -> bool:
        return 0 < self._seconds <= time.monotonic() - self._last
