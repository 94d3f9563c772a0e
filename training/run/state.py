"""The progress of a run: everything that a checkpoint saves besides tensors, as plain values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.tools.checkpoint_links import STATE_FILE
from pipelines.tools.cli import one_line
from training.core.files import read_json_object
from training.core.options import Options, option
from training.run.checkpoint import Contents, DamagedCheckpoint
from training.run.metrics_log import EpochLoss, RunningMeans

# Types of the values in trainer_state.json, by the annotation of the field.
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
    "dict[str, float]": (dict,),
}

# Measurements in a row beyond the limits of a stage after which a run stops: a single one may be chance.
MOST_BEYOND_LIMITS = 2

_METRICS = ("last_validation", "best_validation", "last_evaluation", "best_evaluation")


@dataclass
class EarlyStoppingConfig(Options):
    """Options for stopping when the validation metric no longer improves."""

    help_group = "Saving and measuring"

    early_stopping_patience: int = option(0, on_resume="warn", at_least=0)
    """Stop after N validations in a row without improvement of the validation metric (see
    --early_stopping_min_delta); 0 disables it"""
    best_metric: str = option("auto", on_resume="warn")
    """Metric that the best checkpoint and early stopping depend on: kid or fd of generated images (needs
    --evaluation_epochs or --evaluation_steps), a validation metric such as val_loss, or auto: kid if generated images
    are measured, otherwise the validation metric of the stage"""
    early_stopping_min_delta: float = option(0.0, on_resume="warn", at_least=0)
    """Minimum change of the validation metric that counts as an improvement. The metric is val_loss (lower is
    better), but val_psnr in train_autoencoder.py and val_r2 in train_abstractor.py (higher is better)"""


@dataclass(frozen=True)
class EpochSummary:
    """A finished epoch: mean training loss, validation loss (None if it was not measured), last learning rate."""

    epoch: int
    loss: float
    val_loss: float | None
    learning_rate: float


@dataclass
class RunState:
    """Counters of a run, and the running sums for the next row of metrics.csv.

    The sums are saved, so that the next row is the same as in a run that was not interrupted.
    """

    step: int = 0
    """Number of optimizer steps done."""
    goal_steps: int = 0
    """Number of steps at which the run is complete."""
    images_seen: int = 0
    elapsed_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    best_metric: str = ""
    """Metric of `best_value`; empty in checkpoints of earlier versions, for the validation metric of the stage."""
    best_value: float | None = None
    best_step: int = 0
    validations_without_improvement: int = 0
    beyond_limits_in_a_row: int = 0
    """Number of the last measurements in a row that were beyond the limits of the stage."""
    stopped_early: bool = False
    pending_events: bool = False
    """Whether the run was interrupted before the events after the last step (validation, previews, logging)."""
    global_batch_size: int = 0
    num_samples: int = 0
    most_warmup: float = 1.0
    """Largest share of the steps of a phase that its warm-up may take; 1 in checkpoints of earlier versions."""
    draws_version: int = 1
    """Version of the random draws (`core/draws.py`); 1 in checkpoints of earlier versions, whose runs also go on to
    read the values of each step (`PhaseRunner.waits`)."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the inputs (see `Stage.inputs`); empty in checkpoints of earlier versions."""
    tracker_id: str | None = None
    sessions: int = 0
    means: RunningMeans = field(default_factory=RunningMeans)
    epoch_loss: EpochLoss = field(default_factory=EpochLoss)
    epochs: list[EpochSummary] = field(default_factory=list)
    last_validation: dict[str, float] = field(default_factory=dict)
    last_evaluation: dict[str, float] = field(default_factory=dict)
    best_validation: dict[str, float] = field(default_factory=dict)
    best_evaluation: dict[str, float] = field(default_factory=dict)

    def contents(self) -> Contents:
        """Return what a checkpoint contains of the state."""
        return {STATE_FILE: self.to_json()}

    def load(self, folder: Path) -> None:
        """Load the state from the folder of a checkpoint."""
        self.__dict__.update(vars(RunState.read(folder)))

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Return the state in the folder of a checkpoint. Raises DamagedCheckpoint if it is damaged."""
        values = read_json_object(folder / STATE_FILE)
        if values is None:
            raise DamagedCheckpoint(f"its {STATE_FILE} is missing or damaged")
        try:
            return cls.from_json(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedCheckpoint(
                f"its {STATE_FILE} has other contents than that of a run ({one_line(error, 200)})"
            ) from None

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["means"] = self.means.state()
        values["epoch_loss"] = self.epoch_loss.state()
        values["epochs"] = [dataclasses.asdict(epoch) for epoch in self.epochs]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """Return the state that `to_json` describes. Raises KeyError, TypeError, ValueError or AttributeError."""
        for f in dataclasses.fields(cls):
            types = _TYPES.get(str(f.type), (object,))
            if f.name in values and (not isinstance(values[f.name], types) or _is_other_number(values[f.name], types)):
                raise TypeError(f"{f.name} is {values[f.name]!r}")
        sums = [number for pair in values["means"].values() for number in pair]
        metrics = [number for name in _METRICS for number in values.get(name, {}).values()]
        for number in (*sums, *values["epoch_loss"].values(), *metrics):
            if not isinstance(number, (int, float)):
                raise TypeError(f"{number!r} is not a number")
        known = {f.name for f in dataclasses.fields(cls)}
        state = cls(**{name: value for name, value in values.items() if name in known})
        state.means = RunningMeans(values["means"])
        state.epoch_loss = EpochLoss(values["epoch_loss"])
        state.epochs = [EpochSummary(**epoch) for epoch in values["epochs"]]
        return state

    @property
    def is_diverging(self) -> bool:
        """Whether the last steps were skipped, as their loss or gradient was not finite."""
        return self.skipped_in_a_row > 0

    def step_done(self, images: int) -> None:
        """Count a step; the events after it are now pending."""
        self.step += 1
        self.images_seen += images
        self.pending_events = True

    def count(self, values: dict[str, float], skipped: bool) -> None:
        """Add the values of a step to the running sums, unless the step was skipped."""
        if skipped:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.means.add(values)
        if "loss" in values:  # the first phase may start late
            self.epoch_loss.add(values["loss"])

    def judge_by(self, metric: str, usual: str) -> None:
        """Set the metric that decides about the best step; a best value of another metric is forgotten.

        Args:
            usual: the metric of checkpoints that do not name one.
        """
        if (self.best_metric or usual) != metric:
            self.best_value, self.best_step, self.validations_without_improvement = None, 0, 0
        self.best_metric = metric

    def note_validation(
        self, value: float, lower_is_better: bool, stopping: EarlyStoppingConfig, *, may_be_best: bool = True
    ) -> bool:
        """Record the deciding metric; return whether it is the best so far. NaN never is."""
        if math.isfinite(value) and may_be_best:
            sign = 1 if lower_is_better else -1
            if self.best_value is None or sign * value < sign * self.best_value - stopping.early_stopping_min_delta:
                self.best_value, self.best_step = value, self.step
                self.best_validation = dict(self.last_validation)
                self.best_evaluation = dict(self.last_evaluation)
                self.validations_without_improvement = 0
                return True
        self.validations_without_improvement += 1
        return False

    def note_limits(self, beyond_limits: bool) -> None:
        """Count a measurement of generated images; one within the limits of the stage starts the count again."""
        self.beyond_limits_in_a_row = self.beyond_limits_in_a_row + 1 if beyond_limits else 0

    @property
    def is_beyond_limits(self) -> bool:
        """Whether too many measurements in a row were beyond the limits of the stage."""
        return self.beyond_limits_in_a_row >= MOST_BEYOND_LIMITS

    def must_stop_early(self, stopping: EarlyStoppingConfig) -> bool:
        """Return whether limits or patience are exhausted; patience by validations in a row without improvement."""
        patience = stopping.early_stopping_patience
        return self.is_beyond_limits or (bool(patience) and self.validations_without_improvement >= patience)

    @property
    def is_over(self) -> bool:
        """Whether training is finished, by reaching the goal or by early stopping."""
        return self.step >= self.goal_steps or self.stopped_early


def _is_other_number(value: Any, types: tuple[type, ...]) -> bool:
    """Return whether `value` is a truth value where a number is expected, or a negative count."""
    return (isinstance(value, bool) and bool not in types) or (types == (int,) and value < 0)
