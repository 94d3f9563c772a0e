"""Opening a run folder (new, to be resumed, or set aside), and restoring what its checkpoint holds."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tools.cli import UserError
from training.core.options import Options
from training.engine.launch import on_main
from training.engine.length import goal_steps
from training.engine.run_config import RunConfig
from training.engine.training import Training
from training.run import checkpoint
from training.run.folder import RunFolder, RunFolderConfig
from training.run.state import RunState

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")


def open_run(folder: RunFolder, config: RunFolderConfig, resume_from_checkpoint: str) -> None:
    """Create the folder, or open the one that is there; main process only.

    Raises:
        UserError: the folder holds something other than a run, holds a run although `--resume_from_checkpoint` is
            none, or cannot be written.
    """
    used = folder.path.is_dir() and any(entry.name != ".lock" for entry in folder.path.iterdir())
    if used and config.overwrite:
        folder.check_unused()
        target = folder.set_aside()
        print(f"the old run is set aside in {target}")
    elif used and folder.saved_config() is None and not folder.checkpoints.is_dir():
        raise UserError(
            f"--output_dir {folder.path} is not empty and holds no run; choose a new folder, "
            "or --overwrite to set it aside"
        )
    elif used and resume_from_checkpoint == "none" and folder.saved_config() is not None:
        raise UserError(
            f"{folder.path} holds a run and --resume_from_checkpoint is none; "
            "add --overwrite to start again (the old run is set aside), or leave the flag out to resume"
        )
    folder.create()


def compare_configs(folder: RunFolder, config: Options) -> None:
    """Refuse changes that make it another model or other data, and list the others in one warning."""
    saved = folder.saved_config()
    if saved is None:
        return
    changes = config.changes_from(saved)
    if changes["error"]:
        raise UserError(
            f"the run in {folder.path} was started with other settings: {'; '.join(changes['error'])}. "
            "Put them back, choose another --output_dir, or start again with --overwrite"
        )
    if changes["warn"]:
        logger.warning("resuming with changed settings: %s", "; ".join(changes["warn"]))


def restore(training: Training, config: RunConfig, folder: RunFolder, accelerator: Accelerator) -> str:
    """Load the checkpoint that the run resumes from, if there is one, and set the run's goal.

    Returns:
        A sentence about where the run starts.

    Raises:
        UserError: no such checkpoint, a damaged one, or one of other data or of another model.
    """
    state = training.state
    found = _agreed_checkpoint(config.resume_from_checkpoint, folder, accelerator)
    if found is None and config.validate_only:
        raise UserError(
            f"--validate_only: there is no checkpoint in {folder.path}; name the run with --output_dir, "
            "or a checkpoint with --resume_from_checkpoint"
        )
    if found is not None:
        _check_same_data(RunState.read(found), training)
        _load(training, found)
    exported = on_main(accelerator, lambda: folder.is_exported(state.step))
    state.goal_steps = goal_steps(config, state, training.steps_per_epoch, exported)
    if state.stopped_early and exported and config.extra_epochs:
        state.validations_without_improvement = 0
    if state.step < state.goal_steps and not state.patience_is_spent(config):
        state.stopped_early = False
    return f"resumed from {found.name} at step {state.step}" if found else "starting from scratch"


def _agreed_checkpoint(name: str, folder: RunFolder, accelerator: Accelerator) -> Path | None:
    """The checkpoint that the main process finds for `--resume_from_checkpoint`, on every process."""
    if name == "none":
        return None
    found = on_main(accelerator, lambda: checkpoint.find_checkpoint(folder.checkpoints, name))
    return None if found is None else Path(found)


def _load(training: Training, folder: Path) -> None:
    """Restore every part of the run; a checkpoint that does not fit becomes a UserError."""
    try:
        for part in training.checkpoint_parts:
            part.load(folder)
    except (RuntimeError, KeyError, ValueError, FileNotFoundError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"the checkpoint {folder} is of another model or optimizer ({first}); "
            "put the old settings back, or start again with --overwrite"
        ) from None


def _check_same_data(saved: RunState, training: Training) -> None:
    """Raise UserError when another number of samples, or another global batch, would change what each step sees."""
    if saved.num_samples != training.num_images:
        raise UserError(
            f"the run was started on {saved.num_samples} images and the data set now has {training.num_images}; "
            "restore it, or train on in a new --output_dir with --init_from this run"
        )
    global_batch_size = training.layout.global_batch_size
    if saved.global_batch_size != global_batch_size:
        raise UserError(
            f"the run was started with a global batch of {saved.global_batch_size} and this one has "
            f"{global_batch_size}; choose --train_batch_size and --gradient_accumulation_steps so that, times the "
            f"number of processes, they give {saved.global_batch_size}"
        )


def check_disk(folder: RunFolder, checkpoint_bytes: int, total_limit: int) -> None:
    """Raise UserError unless the disk holds the checkpoints to come: those kept, `best`, and one being written."""
    free = shutil.disk_usage(folder.path).free
    there = sum(f.stat().st_size for f in folder.checkpoints.rglob("*") if f.is_file() and not f.is_symlink())
    needed = checkpoint_bytes * (total_limit + 2)
    if needed > free + there:
        raise UserError(
            f"the disk of {folder.path} has {free / 2**30:.2f} GiB free, and {total_limit} checkpoints beside `best` "
            f"and the one being written need {needed / 2**30:.2f} GiB; free some space, choose another --output_dir, "
            "or lower --checkpoints_total_limit"
        )
