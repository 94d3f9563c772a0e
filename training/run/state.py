"""Where a run stands: everything a checkpoint must carry beside tensors, as plain numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from training.run.metrics_log import EpochLoss, RunningMeans


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

    def note_validation(self, value: float, lower_is_better: bool, min_delta: float) -> bool:
        """Keep count of improvements; True when `value` is the best so far. NaN never is."""
        if math.isfinite(value):
            sign = 1 if lower_is_better else -1
            if self.best_value is None or sign * value < sign * self.best_value - min_delta:
                self.best_value, self.best_step = value, self.step
                self.validations_without_improvement = 0
                return True
        self.validations_without_improvement += 1
        return False


def due(step: int, every_steps: int, every_epochs: int, steps_per_epoch: int) -> bool:
    """The one cadence: whether something falls due after `step` steps; 0 switches a count off."""
    by_steps = every_steps > 0 and step % every_steps == 0
    by_epochs = every_epochs > 0 and step % (every_epochs * steps_per_epoch) == 0
    return step > 0 and (by_steps or by_epochs)
