"""Opening a run folder: fresh, gone on with, or set aside; and what must be the same for going on to be honest."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tools.cli import UserError

if TYPE_CHECKING:
    from training.core.run_config import RunConfig
    from training.run.folder import RunFolder
    from training.run.state import RunState

logger = logging.getLogger("halftone")


def open_run(folder: RunFolder, config: RunConfig) -> None:
    """Create the folder, or open the one that is there; main process only.

    Raises:
        UserError: a folder that is no run, a used one with `--resume_from_checkpoint none`, or one not writable.
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
    elif used and config.resume_from_checkpoint == "none" and folder.saved_config() is not None:
        raise UserError(
            f"{folder.path} holds a run and --resume_from_checkpoint is none; "
            "add --overwrite to start anew (the old run is set aside), or leave the flag out to go on"
        )
    folder.create()


def compare_configs(folder: RunFolder, config: RunConfig) -> None:
    """Refuse changes that make it another model or other data, and list the others in one warning."""
    saved = folder.saved_config()
    if saved is None:
        return
    changes = config.changes_from(saved)
    if changes["error"]:
        raise UserError(
            f"the run in {folder.path} was started with other settings: {'; '.join(changes['error'])}. "
            "Put them back, choose another --output_dir, or start anew with --overwrite"
        )
    if changes["warn"]:
        logger.warning("going on with changed settings: %s", "; ".join(changes["warn"]))


def check_same_data(state: RunState, global_batch_size: int, num_samples: int) -> None:
    """Raise UserError when another number of samples, or another global batch, would change what each step sees."""
    if state.num_samples != num_samples:
        raise UserError(
            f"the run was started on {state.num_samples} images and the data set now has {num_samples}; "
            "restore it, or train on in a new --output_dir with --init_from this run"
        )
    if state.global_batch_size != global_batch_size:
        raise UserError(
            f"the run was started with a global batch of {state.global_batch_size} and this one has "
            f"{global_batch_size}; choose --train_batch_size and --gradient_accumulation_steps so that, times the "
            f"number of processes, they give {state.global_batch_size}"
        )


def load_or_explain(load: Callable[[Path], None], checkpoint: Path) -> None:
    """Turn a misfit between checkpoint and model into a UserError."""
    try:
        load(checkpoint)
    except (RuntimeError, KeyError, ValueError, FileNotFoundError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"the checkpoint {checkpoint} is of another model or optimizer ({first}); "
            "put the old settings back, or start anew with --overwrite"
        ) from None


def goal_steps(config: RunConfig, state: RunState, steps_per_epoch: int, exported: bool) -> int:
    """How many steps the run is to have in all.

    `--extra_epochs` counts from where a finished session ended; a session that was interrupted, be it between its last
    step and the export, keeps its goal, so that the same command typed again finishes it rather than setting a new one.
    """
    if config.extra_epochs:
        finished = exported and (state.stopped_early or state.step >= state.goal_steps)
        return state.step + config.extra_epochs * steps_per_epoch if finished or state.step == 0 else state.goal_steps
    asked = config.max_train_steps or config.num_train_epochs * steps_per_epoch
    return max(asked, state.step)


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
