"""Where a run stands: everything a checkpoint must carry beside tensors, as plain numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.core.options import Options, option
from training.run.checkpoint import load_json, save_json
from training.run.metrics_log import EpochLoss, RunningMeans

STATE_FILE = "trainer_state.json"


@dataclass
class EarlyStoppingConfig(Options):
    """When a run stops because its validation metric no longer improves."""

    early_stopping_patience: int = option(0, on_resume="warn", at_least=0)
    """Stop after this many validations in a row without improvement; 0: never."""
    early_stopping_min_delta: float = option(0.0, on_resume="warn", at_least=0)
    """The smallest change of the metric that counts as an improvement."""


@dataclass(frozen=True)
class EpochSummary:
    """One finished epoch: mean training loss, validation loss (None if it was not measured), last learning rate."""

    epoch: int
    loss: float
    val_loss: float | None
    learning_rate: float


@dataclass
class RunState:
    """Counts steps and images; holds the sums between two logged rows, so that a resumed row equals an unbroken one."""

    step: int = 0
    """Optimizer steps done."""
    goal_steps: int = 0
    """Steps this run is meant to have."""
    images_seen: int = 0
    elapsed_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    best_value: float | None = None
    best_step: int = 0
    validations_without_improvement: int = 0
    stopped_early: bool = False
    pending_events: bool = False
    """The step is done, but not what falls due after it (validation, previews, the row): a stop came between."""
    global_batch_size: int = 0
    num_samples: int = 0
    tracker_id: str | None = None
    sessions: int = 0
    means: RunningMeans = field(default_factory=RunningMeans)
    epoch_loss: EpochLoss = field(default_factory=EpochLoss)
    epochs: list[EpochSummary] = field(default_factory=list)
    last_validation: dict[str, float] = field(default_factory=dict)
    best_validation: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint's folder."""
        save_json(self.to_json(), folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Take the state from a checkpoint's folder."""
        self.__dict__.update(vars(RunState.read(folder)))

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """The state in a checkpoint's folder."""
        return cls.from_json(load_json(folder / STATE_FILE))

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["means"] = self.means.state()
        values["epoch_loss"] = self.epoch_loss.state()
        values["epochs"] = [dataclasses.asdict(epoch) for epoch in self.epochs]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        known = {f.name for f in dataclasses.fields(cls)}
        state = cls(**{name: value for name, value in values.items() if name in known})
        state.means = RunningMeans(values["means"])
        state.epoch_loss = EpochLoss(values["epoch_loss"])
        state.epochs = [EpochSummary(**epoch) for epoch in values["epochs"]]
        return state

    def step_done(self, images: int) -> None:
        """Count a step; what falls due after it is still to be done."""
        self.step += 1
        self.images_seen += images
        self.pending_events = True

    def count(self, values: dict[str, float], skipped: bool) -> None:
        """Add a step's values to the sums of the next row; those of a step that was skipped do not count."""
        if skipped:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.means.add(values)
        if "loss" in values:  # the first phase may start late
            self.epoch_loss.add(values["loss"])

    def note_validation(self, value: float, lower_is_better: bool, stopping: EarlyStoppingConfig) -> bool:
        """Keep count of improvements; True when `value` is the best so far, which NaN never is."""
        if math.isfinite(value):
            sign = 1 if lower_is_better else -1
            if self.best_value is None or sign * value < sign * self.best_value - stopping.early_stopping_min_delta:
                self.best_value, self.best_step = value, self.step
                self.best_validation = dict(self.last_validation)
                self.validations_without_improvement = 0
                return True
        self.validations_without_improvement += 1
        return False

    def patience_is_spent(self, stopping: EarlyStoppingConfig) -> bool:
        """Whether there were as many validations in a row without improvement as `stopping` allows."""
        patience = stopping.early_stopping_patience
        return bool(patience) and self.validations_without_improvement >= patience

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.goal_steps or self.stopped_early
