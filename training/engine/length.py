"""The length of a run, in epochs or steps."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.tools.cli import UserError
from training.core.options import Options, option
from training.run.state import RunState


@dataclass
class LengthConfig(Options):
    """Three ways to set the length of a run."""

    help_group = "Length"

    num_train_epochs: int = option(10, on_resume="free", at_least=0, essential=True)
    """Total number of epochs, counted from the first start of the run"""
    extra_epochs: int = option(0, on_resume="free", at_least=0)
    """Train N more epochs after a complete run; overrides --num_train_epochs and --max_train_steps; 0 disables it"""
    max_train_steps: int = option(0, on_resume="free", at_least=0, essential=True)
    """Total number of optimizer steps; overrides --num_train_epochs; 0 disables it"""
    max_train_minutes: float = option(0.0, on_resume="free", at_least=0, essential=True)
    """Time limit in minutes for the whole run; the speed of this machine is measured first, and the number of steps
    (and with it the learning-rate schedule) is shortened to fit. 0 disables it"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not (self.num_train_epochs or self.max_train_steps or self.extra_epochs):
            raise UserError(
                "--num_train_epochs, --max_train_steps and --extra_epochs are all 0: nothing to train; set one of them"
            )

    def time_limit(self) -> tuple[str, str]:
        """Return what limits the time of the run, and how to train further afterwards, for a message."""
        limit = f"--max_train_minutes is {self.max_train_minutes:.3g}"
        return limit, "To train all steps later, run the same command without that flag"

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the total number of steps according to `max_train_steps` or `num_train_epochs`."""
        return self.max_train_steps or self.num_train_epochs * steps_per_epoch


def goal_steps(config: LengthConfig, state: RunState, steps_per_epoch: int, exported: bool) -> int:
    """Return the number of steps at which the run is complete.

    `--extra_epochs` counts from the last step of a complete run. An interrupted session keeps its goal, even if the
    interruption came between its last step and the export: the same command, run again, finishes the session instead
    of adding further epochs.

    Args:
        exported: whether the exported pipeline is that of `state.step`.
    """
    if config.extra_epochs:
        finished = exported and (state.stopped_early or state.step >= state.goal_steps)
        return state.step + config.extra_epochs * steps_per_epoch if finished or state.step == 0 else state.goal_steps
    return max(config.total_steps(steps_per_epoch), state.step)
