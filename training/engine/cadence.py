"""When a run logs, validates, previews and saves: every N steps, every N epochs, or both."""

from __future__ import annotations

from dataclasses import dataclass

from training.core.options import Options, option


@dataclass
class CadenceConfig(Options):
    """How often a run logs, validates, shows previews and saves."""

    help_group = "Saving and measuring"

    logging_steps: int = option(10, on_resume="warn", at_least=1)
    """Write a row to metrics.csv every N optimizer steps, and at the end of each epoch"""
    validation_epochs: int = option(1, on_resume="warn", at_least=0)
    """Validate every N epochs; 0 disables it. A run always ends with a validation"""
    validation_steps: int = option(0, on_resume="warn", at_least=0)
    """Validate every N optimizer steps, in addition to --validation_epochs; 0 disables it"""
    evaluation_epochs: int = option(0, on_resume="warn", at_least=0, essential=True)
    """Measure generated images every N epochs: their distance from real ones, and copies of training images; 0 disables
    it. If it is on, a run also ends with a measurement"""
    evaluation_steps: int = option(0, on_resume="warn", at_least=0)
    """Measure generated images every N optimizer steps, in addition to --evaluation_epochs; 0 disables it"""
    memorization_epochs: int = option(0, on_resume="warn", at_least=0)
    """Search for copies of training images among generated ones every N epochs, in addition to the measurements of
    --evaluation_epochs; 0 disables it"""
    preview_epochs: int = option(1, on_resume="free", at_least=0)
    """Save previews every N epochs; 0 disables it. Previews are always saved at the end of a run"""
    preview_steps: int = option(0, on_resume="free", at_least=0)
    """Save previews every N optimizer steps, in addition to --preview_epochs; 0 disables it"""
    checkpointing_epochs: int = option(1, on_resume="free", at_least=0)
    """Save a checkpoint every N epochs; 0 disables it. A checkpoint is always saved after the best validation so far
    and at the end of a run"""
    checkpointing_steps: int = option(0, on_resume="free", at_least=0)
    """Save a checkpoint every N optimizer steps, in addition to --checkpointing_epochs; 0 disables it"""


class Cadence:
    """Decides what is due after each step of a run with `steps_per_epoch` steps per epoch."""

    def __init__(self, config: CadenceConfig, steps_per_epoch: int):
        self.config, self.steps_per_epoch = config, steps_per_epoch

    def validation_due(self, step: int) -> bool:
        return due(step, self.config.validation_steps, self.config.validation_epochs, self.steps_per_epoch)

    @property
    def evaluates(self) -> bool:
        """Whether generated images are measured during the run."""
        return self.config.evaluation_steps > 0 or self.config.evaluation_epochs > 0

    def evaluation_due(self, step: int) -> bool:
        return due(step, self.config.evaluation_steps, self.config.evaluation_epochs, self.steps_per_epoch)

    def copies_due(self, step: int) -> bool:
        return due(step, 0, self.config.memorization_epochs, self.steps_per_epoch)

    def preview_due(self, step: int) -> bool:
        return due(step, self.config.preview_steps, self.config.preview_epochs, self.steps_per_epoch)

    def checkpoint_due(self, step: int) -> bool:
        return due(step, self.config.checkpointing_steps, self.config.checkpointing_epochs, self.steps_per_epoch)

    def validation_steps(self, steps: int) -> set[int]:
        """Steps up to `steps` after which a validation is due."""
        return all_due(steps, self.config.validation_steps, self.config.validation_epochs, self.steps_per_epoch)

    def evaluation_steps(self, steps: int) -> set[int]:
        """Steps of a run of `steps` steps after which generated images are measured."""
        every = all_due(steps, self.config.evaluation_steps, self.config.evaluation_epochs, self.steps_per_epoch)
        return every | {steps} if self.evaluates else every

    def copies_steps(self, steps: int) -> set[int]:
        """Steps up to `steps` after which only copies are searched for."""
        return all_due(steps, 0, self.config.memorization_epochs, self.steps_per_epoch) - self.evaluation_steps(steps)

    def preview_steps(self, steps: int) -> set[int]:
        """Steps up to `steps` after which previews are due."""
        return all_due(steps, self.config.preview_steps, self.config.preview_epochs, self.steps_per_epoch)

    def checkpoint_steps(self, steps: int) -> set[int]:
        """Steps up to `steps` after which a checkpoint is due."""
        return all_due(steps, self.config.checkpointing_steps, self.config.checkpointing_epochs, self.steps_per_epoch)

    def row_due(self, step: int) -> bool:
        return self.ends_epoch(step) or step % self.config.logging_steps == 0

    def ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0


def due(step: int, every_steps: int, every_epochs: int, steps_per_epoch: int) -> bool:
    """Return whether an event is due after `step` steps; 0 disables `every_steps` or `every_epochs`."""
    by_steps = every_steps > 0 and step % every_steps == 0
    by_epochs = every_epochs > 0 and step % (every_epochs * steps_per_epoch) == 0
    return step > 0 and (by_steps or by_epochs)


def all_due(steps: int, every_steps: int, every_epochs: int, steps_per_epoch: int) -> set[int]:
    """Every step from 1 to `steps` for which `due` is true."""
    periods = [period for period in (every_steps, every_epochs * steps_per_epoch) if period > 0]
    return {step for period in periods for step in range(period, steps + 1, period)}
