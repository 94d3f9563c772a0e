"""Writing checkpoints during a run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pipelines.tools.cli import UserError
from training.engine.training import Training
from training.publishing.exporter import Exporter
from training.run import checkpoint
from training.run.folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")


class CheckpointWriter:
    """Writes checkpoints (the state of the run and its pipeline), deletes old ones, and uploads them to the Hub.

    Args:
        keep: number of the newest checkpoints to keep, in addition to `best`.
    """

    def __init__(
        self, training: Training, folder: RunFolder, exporter: Exporter, accelerator: Accelerator, *, keep: int
    ):
        self.training, self.folder, self.exporter = training, folder, exporter
        self.accelerator, self.keep = accelerator, keep

    def write(self, *, must_succeed: bool) -> None:
        """Write a checkpoint of the current state; every process calls it.

        Args:
            must_succeed: if False, training continues after a failed write (such as a full disk); the earlier
                checkpoints are kept.

        Raises:
            UserError: the checkpoint could not be written, and `must_succeed` is True.
        """
        if self.accelerator.is_main_process:
            step = self.training.state.step
            try:
                path = checkpoint.write_checkpoint(self.folder.checkpoints, step, self.training.write_files)
            except OSError as error:
                logger.error("the checkpoint of step %d could not be written: %s", step, error)
                if must_succeed:
                    raise UserError(
                        f"the checkpoint of step {step} could not be written ({error}); free space on the disk of "
                        f"{self.folder.path} and run the command again to resume from the previous checkpoint"
                    ) from error
            else:
                if self.training.state.best_step == step or not (self.folder.checkpoints / "best").exists():
                    checkpoint.link(self.folder.checkpoints, "best", path)
                checkpoint.prune(self.folder.checkpoints, self.keep)
                self.exporter.checkpoint_saved(path)
        self.accelerator.wait_for_everyone()
