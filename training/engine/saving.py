"""Writing checkpoints during a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tools.checkpoint_links import linked_checkpoint
from pipelines.tools.cli import UserError
from training.core.informing import Informing
from training.engine.cadence import Cadence
from training.engine.launch import on_main
from training.engine.training import Training
from training.publishing.exporter import Exporter
from training.run import checkpoint
from training.run.checkpoint import Contents
from training.run.folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")

# A larger checkpoint is written at once: its copy might not fit into the memory of the machine beside the training.
MOST_HELD_BYTES = 2**30


@dataclass(frozen=True)
class HeldCheckpoint:
    """The checkpoint of the best step so far, in memory."""

    step: int
    contents: Contents


def holds_best(training: Training, cadence: Cadence) -> bool:
    """Return whether a checkpoint that is due only because it is the best so far is held in memory.

    It is then written together with the next one. Where no other checkpoint falls due before the end of the run, a
    killed run would lose everything, so the best one is written at once. The result is the same on every process.
    """
    between = cadence.checkpoint_steps() - {cadence.total_steps}
    return bool(cadence.config.checkpointing_minutes or between) and training.checkpoint_bytes() <= MOST_HELD_BYTES


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
        self._held: HeldCheckpoint | None = None

    def hold(self) -> None:
        """Hold a checkpoint of the current state, the best so far, in memory until `write`; every process calls it.

        It replaces one that is held, which is then never written. After a kill, the run resumes from an earlier
        checkpoint and finds the same best step again.

        Raises:
            UserError: on every process, if the weights are not finite.
        """
        with self.training.gathered():
            on_main(self.accelerator, self._hold)

    def _hold(self) -> None:
        self._refuse_diverged_weights()
        self._held = None  # frees its memory before the copy is made
        self._held = HeldCheckpoint(self.training.state.step, checkpoint.copy_contents(self.training.contents()))

    def write(self, *, must_succeed: bool, by_time: bool = False) -> bool:
        """Write the checkpoint that is held, if any, and then one of the current state; every process calls it.

        Args:
            by_time: whether the checkpoint is due only by time. The one that is held then takes its place: the time
                counts from its step on, so that a killed run never loses more than that time, and it is written once.
            must_succeed: if False, training continues after a failed write (such as a full disk); the earlier
                checkpoints are kept, and the one in memory is held until the next call.

        Returns:
            Whether the one that was held was written in the place of the current one.

        Raises:
            UserError: on every process, if the weights are not finite, or if `must_succeed` is True and the checkpoint
                could not be written.
        """
        with self.training.gathered():
            return on_main(self.accelerator, lambda: self._write(must_succeed, by_time))

    def _write(self, must_succeed: bool, by_time: bool) -> bool:
        state = self.training.state
        if self._held is not None and self._held.step != state.best_step:  # the current step is better
            self._held = None
        in_its_place = by_time and self._held is not None
        written = self._write_held(must_succeed)
        self._refuse_diverged_weights()
        # The state names the best step, so a checkpoint of it is not written without the one of that step.
        if written and not in_its_place:
            self._write_checkpoint(state.step, None, must_succeed)
        return written and in_its_place

    def _write_held(self, must_succeed: bool) -> bool:
        """Write the checkpoint that is held, if any; return False if that failed."""
        held = self._held
        if held is not None and not self._write_checkpoint(held.step, held.contents, must_succeed):
            return False
        self._held = None
        return True

    def _write_checkpoint(self, step: int, held: Contents | None, must_succeed: bool) -> bool:
        """Write the checkpoint of a step, from `held` or from the current state; return False if that failed."""
        folder = self.folder
        try:
            folder.create_again()
            path = checkpoint.write_checkpoint(folder.checkpoints, step, lambda files: self._write_files(files, held))
        except (OSError, UserError) as error:
            logger.error("the checkpoint of step %d could not be written: %s", step, error)
            if must_succeed:
                raise UserError(
                    f"the checkpoint of step {step} could not be written ({error}); free space on the disk of "
                    f"{folder.path} and run the command again to resume from the previous checkpoint"
                ) from error
            return False
        with self._informing("the link `best`", "the next session links it"):
            if self.training.state.best_step == step or linked_checkpoint(folder.checkpoints, "best") is None:
                checkpoint.link(folder.checkpoints, "best", path)
        # Weights that give a loss that is not finite may be ruined; they must not take the place of good ones.
        if not self.training.state.is_diverging:
            with self._informing("the folder of the checkpoints", "old checkpoints are deleted later"):
                checkpoint.prune(folder.checkpoints, self.keep)
        self.exporter.checkpoint_saved(path)
        return True

    def _write_files(self, folder: Path, held: Contents | None) -> None:
        self.training.write_files(folder, held)
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

        The best checkpoint is written if it is held: with other settings, the run would not find it again.
        If `latest` has the weights with which these steps were taken, it is linked to the checkpoint before it.

        Returns:
            A clause on the checkpoints that are kept; the same on every process.
        """
        return on_main(self.accelerator, self._step_back)

    def _step_back(self) -> str:
        state = self.training.state
        self._write_held(must_succeed=False)
        with self._informing("the link `latest`"):
            checkpoint.step_back(self.folder.checkpoints, state.step - state.skipped_in_a_row)
        return self._kept()

    def _kept(self) -> str:
        links = {name: linked_checkpoint(self.folder.checkpoints, name) for name in ("latest", "best")}
        if links["latest"] is None:
            return "the run has no checkpoint yet"
        places = " and ".join(f"`{name}` ({path.name})" for name, path in links.items() if path is not None)
        return f"in {self.folder.checkpoints}, {places} are from before; the run resumes from `latest`"
