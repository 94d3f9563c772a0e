"""Writing checkpoints while a run goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tools.cli import UserError
from training.engine.training import Training
from training.engine.validation import evaluating
from training.publishing.exporter import Exporter
from training.run import checkpoint
from training.run.folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")


class CheckpointWriter:
    """Writes the run's parts and its pipeline as one checkpoint, prunes the older ones, and passes it to the Hub.

    Args:
        keep: how many of the newest checkpoints stay, beside `best`.
    """

    def __init__(
        self, training: Training, folder: RunFolder, exporter: Exporter, accelerator: Accelerator, *, keep: int
    ):
        self.training, self.folder, self.exporter = training, folder, exporter
        self.accelerator, self.keep = accelerator, keep

    def write(self, *, must_succeed: bool) -> None:
        """A checkpoint of this moment; every process calls it.

        Args:
            must_succeed: False lets training continue when the disk is full; the earlier checkpoints stay.

        Raises:
            UserError: it could not be written although it had to be.
        """
        if self.accelerator.is_main_process:
            step = self.training.state.step
            try:
                path = checkpoint.write_checkpoint(self.folder.checkpoints, step, self._write_files)
            except OSError as error:
                logger.error("the checkpoint of step %d could not be written: %s", step, error)
                if must_succeed:
                    raise UserError(
                        f"the checkpoint of step {step} could not be written ({error}); make room on the "
                        f"disk of {self.folder.path} and type the command again: it goes on from the one before"
                    ) from error
            else:
                if self.training.state.best_step == step or not (self.folder.checkpoints / "best").exists():
                    checkpoint.link(self.folder.checkpoints, "best", path)
                checkpoint.prune(self.folder.checkpoints, self.keep)
                self.exporter.checkpoint_saved(path)
        self.accelerator.wait_for_everyone()

    def _write_files(self, folder: Path) -> None:
        training = self.training
        with evaluating(training.modules, training.ema):
            training.stage.pipeline().save_pretrained(folder / "pipeline")
        for part in training.checkpoint_parts:
            part.save(folder)
