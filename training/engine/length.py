"""How long a run is."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.tools.cli import UserError
from training.core.options import Options, option
from training.run.state import RunState


@dataclass
class LengthConfig(Options):
    """How long a run trains: one of three ways to say it."""

    num_train_epochs: int = option(10, on_resume="free", at_least=0)
    """Number of epochs in total, counted from the very beginning of the run."""
    extra_epochs: int = option(0, on_resume="free", at_least=0)
    """Train this many epochs more from where the run stands, instead of a total."""
    max_train_steps: int = option(0, on_resume="free", at_least=0)
    """Number of steps in total; 0 counts epochs."""
    max_train_minutes: float = option(0.0, on_resume="free", at_least=0)
    """Train fewer steps where that is needed to finish within this many minutes on this machine; 0 sets no limit."""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not (self.num_train_epochs or self.max_train_steps or self.extra_epochs):
            raise UserError("nothing to train: give --num_train_epochs, --max_train_steps or --extra_epochs")

    def total_steps(self, steps_per_epoch: int) -> int:
        """The total that `max_train_steps` or `num_train_epochs` asks for."""
        return self.max_train_steps or self.num_train_epochs * steps_per_epoch


def goal_steps(config: LengthConfig, state: RunState, steps_per_epoch: int, exported: bool) -> int:
    """The number of steps that the run has when it is complete.

    `--extra_epochs` counts from where a finished session ended. A session that was interrupted, even between its last
    step and the export, keeps its goal, so that the same command typed again finishes it instead of setting a new one.

    Args:
        exported: whether the run's pipeline is the one of `state.step`.
    """
    if config.extra_epochs:
        finished = exported and (state.stopped_early or state.step >= state.goal_steps)
        return state.step + config.extra_epochs * steps_per_epoch if finished or state.step == 0 else state.goal_steps
    return max(config.total_steps(steps_per_epoch), state.step)
