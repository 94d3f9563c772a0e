"""Writing checkpoints during a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tools.checkpoint_links import linked_checkpoint
from pipelines.tools.cli import UserError
from training.core.informing import Informing
from training.engine.launch import on_main
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
        self._informing = Informing()

    def write(self, *, must_succeed: bool) -> None:
        """Write a checkpoint of the current state; every process calls it.

        Args:
            must_succeed: if False, training continues after a failed write (such as a full disk); the earlier
                checkpoints are kept.

        Raises:
            UserError: on every process, if the weights are not finite, or if `must_succeed` is True and the checkpoint
                could not be written.
        """
        on_main(self.accelerator, lambda: self._write(must_succeed))

    def _write(self, must_succeed: bool) -> None:
        step, folder = self.training.state.step, self.folder
        self._refuse_diverged_weights()
        try:
            folder.create_again()
            path = checkpoint.write_checkpoint(folder.checkpoints, step, self._write_files)
        except (OSError, UserError) as error:
            logger.error("the checkpoint of step %d could not be written: %s", step, error)
            if must_succeed:
                raise UserError(
                    f"the checkpoint of step {step} could not be written ({error}); free space on the disk of "
                    f"{folder.path} and run the command again to resume from the previous checkpoint"
                ) from error
            return
        with self._informing("the link `best`", "the next session links it"):
            if self.training.state.best_step == step or linked_checkpoint(folder.checkpoints, "best") is None:
                checkpoint.link(folder.checkpoints, "best", path)
        # Weights that give a loss that is not finite may be ruined; they must not take the place of good ones.
        if not self.training.state.is_diverging:
            with self._informing("the folder of the checkpoints", "old checkpoints are deleted later"):
                checkpoint.prune(folder.checkpoints, self.keep)
        self.exporter.checkpoint_saved(path)

    def _write_files(self, folder: Path) -> None:
        self.training.write_files(folder)
        self.folder.copy_config(folder)

    def _refuse_diverged_weights(self) -> None:
        """Raise UserError if weights are not finite: a checkpoint of them would take the place of a good one."""
        diverged = self.training.diverged_modules()
        if not diverged:
            return
        state = self.training.state
        raise UserError(
            f"weights of {', '.join(diverged)} are not finite after step {state.step}: training has diverged. No "
            f"checkpoint of them was written; {self._kept()}. Lower --learning_rate, or use --mixed_precision bf16 or "
            "no, and run the command again"
        )

    def step_back(self) -> str:
        """After `skipped_in_a_row` steps that were not finite, make the run resume from a checkpoint from before them.

        If `latest` has the weights with which these steps were taken, it is linked to the checkpoint before it.

        Returns:
            A clause on the checkpoints that are kept; the same on every process.
        """
        return on_main(self.accelerator, self._step_back)

    def _step_back(self) -> str:
        state = self.training.state
        with self._informing("the link `latest`"):
            checkpoint.step_back(self.folder.checkpoints, state.step - state.skipped_in_a_row)
        return self._kept()

    def _kept(self) -> str:
        links = {name: linked_checkpoint(self.folder.checkpoints, name) for name in ("latest", "best")}
        if links["latest"] is None:
            return "the run has no checkpoint yet"
        places = " and ".join(f"`{name}` ({path.name})" for name, path in links.items() if path is not None)
        return f"in {self.folder.checkpoints}, {places} are from before; the run resumes from `latest`"
