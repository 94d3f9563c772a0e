"""Opening a run folder (new, to be resumed, or to be moved away), and restoring its checkpoint."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tools.cli import UserError, cause, one_line
from training.core.informing import Informing
from training.engine.launch import on_main
from training.engine.length import goal_steps
from training.engine.run_config import RunConfig
from training.engine.training import Training
from training.run import checkpoint
from training.run.checkpoint import DamagedCheckpoint
from training.run.folder import RunFolder, RunFolderConfig
from training.run.state import RunState

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")


def open_run(folder: RunFolder, config: RunFolderConfig, resume_from_checkpoint: str) -> None:
    """Create the run folder, or open the existing one; called on the main process only.

    Raises:
        UserError: the folder contains something other than a run, contains a run although `--resume_from_checkpoint`
            is none, or cannot be written.
    """
    used = folder.path.is_dir() and any(entry.name != ".lock" for entry in folder.path.iterdir())
    if used and config.overwrite:
        target = folder.set_aside()
        if target is not None:
            print(f"the old run was moved to {target}")
    elif used and not folder.is_run() and not folder.checkpoints.is_dir():
        raise UserError(f"--output_dir {folder.path} is not empty and does not contain a run; choose a new folder")
    elif used and resume_from_checkpoint == "none" and folder.saved_config() is not None:
        raise UserError(
            f"{folder.path} contains a run, and --resume_from_checkpoint is none; "
            "add --overwrite to start again (the old run is kept in another folder), or leave the flag out to resume"
        )
    folder.create()


def compare_configs(folder: RunFolder, config: RunConfig) -> None:
    """Raise UserError for changed settings that a run cannot resume with; list the others in one warning."""
    saved = folder.saved_config()
    if saved is None:
        return
    changes = config.changes_from(saved)
    moved = config.moved_from(saved)
    known = _recorded_inputs(folder, config.resume_from_checkpoint) if moved else {}
    refused = changes["error"] + [text for name, texts in moved.items() if name not in known for text in texts]
    if refused:
        raise UserError(
            f"the run in {folder.path} was started with other settings: {'; '.join(refused)}. "
            "Restore them, choose another --output_dir, or start again with --overwrite"
        )
    if changes["warn"]:
        logger.warning("resuming with changed settings: %s", "; ".join(changes["warn"]))


def _recorded_inputs(folder: RunFolder, name: str) -> dict[str, str]:
    """Return the fingerprints of the inputs in the checkpoint `name`; none in checkpoints of earlier versions."""
    source = None if name == "none" else checkpoint.find_checkpoint(folder.checkpoints, name)
    return RunState.read(Path(source)).inputs if source else {}


def restore(training: Training, config: RunConfig, folder: RunFolder, accelerator: Accelerator) -> str:
    """Load the checkpoint that the run resumes from, if any, and set the number of steps to train.

    Returns:
        A phrase for the log: the checkpoint and step that the run resumes from, or that it starts from scratch.

    Raises:
        UserError: the checkpoint does not exist, is damaged, or belongs to other data or another model.
    """
    state = training.state
    source = _agreed_checkpoint(config.resume_from_checkpoint, folder, accelerator)
    if source is None and config.validate_only:
        raise UserError(
            f"--validate_only needs a checkpoint, and {folder.path} has none; name the run with --output_dir, "
            "or a checkpoint with --resume_from_checkpoint"
        )
    inputs = on_main(accelerator, training.stage.inputs)
    if source is not None:
        try:
            saved = RunState.read(source)
        except DamagedCheckpoint as damage:
            raise _damaged(source, str(damage)) from None
        _check_same_data(saved, training)
        on_main(accelerator, lambda: _check_same_inputs(saved.inputs, inputs, config, folder))
        _load(training, source)
    state.inputs = inputs
    exported = on_main(accelerator, lambda: folder.is_exported(state.step))
    state.goal_steps = goal_steps(config, state, training.steps_per_epoch, exported)
    if state.stopped_early and exported and config.extra_epochs:
        state.validations_without_improvement, state.beyond_limits_in_a_row = 0, 0
    if state.step < state.goal_steps and not state.must_stop_early(config):
        state.stopped_early = False
    return f"resumed from {source.name} at step {state.step}" if source else "starting from scratch"


def _agreed_checkpoint(name: str, folder: RunFolder, accelerator: Accelerator) -> Path | None:
    """Find the checkpoint for `--resume_from_checkpoint` on the main process, and return it on every process."""
    if name == "none":
        return None
    path = on_main(accelerator, lambda: checkpoint.find_checkpoint(folder.checkpoints, name))
    return None if path is None else Path(path)


def _load(training: Training, folder: Path) -> None:
    """Restore every part of the run. Raises UserError when the checkpoint is of another model or optimizer."""
    try:
        for part in training.checkpoint_parts:
            part.load(folder)
    except (RuntimeError, KeyError, ValueError, FileNotFoundError) as error:
        raise UserError(
            f"the checkpoint {folder} is of another model or optimizer ({one_line(error, 300)}); "
            "restore the old settings, or start again with --overwrite"
        ) from None
    except Exception as error:  # a file whose checksum is right, but which no version of Halftone has written
        raise _damaged(folder, cause(error)) from None


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the checkpoint {folder} cannot be loaded ({reason}); choose another one with --resume_from_checkpoint, or "
        "start again with --overwrite (the old run is kept in another folder)"
    )


def _check_same_data(saved: RunState, training: Training) -> None:
    """Raise UserError if the number of samples or the global batch size changed, as each step would see other data."""
    if saved.num_samples != training.num_images:
        raise UserError(
            f"the run was started on {saved.num_samples} images and the data set now has {training.num_images}; "
            "restore the data set, or start a new run in another --output_dir with --init_from this run"
        )
    global_batch_size = training.layout.global_batch_size
    if saved.global_batch_size != global_batch_size:
        raise UserError(
            f"the run was started with a global batch size of {saved.global_batch_size}, which is now "
            f"{global_batch_size}; choose --train_batch_size and --gradient_accumulation_steps so that their product, "
            f"times the number of processes, is {saved.global_batch_size}"
        )


def _check_same_inputs(saved: dict[str, str], now: dict[str, str], config: RunConfig, folder: RunFolder) -> None:
    """Raise UserError if an input has another content than in the run; log the inputs that only moved."""
    moved = config.moved_from(folder.saved_config() or {})
    for name in sorted(saved.keys() & (now.keys() | moved.keys())):
        what, changed = name.replace("_", " "), ", ".join(moved.get(name, ()))
        if saved[name] != now.get(name):
            raise UserError(
                f"the {what} of the run in {folder.path} had another content{f' ({changed})' if changed else ''}: "
                f"fingerprint {saved[name][:12]} then, {now.get(name, 'none')[:12]} now. Restore the {what}, or start "
                "a new run in another --output_dir with --init_from this run"
            )
        if changed:
            logger.info("the %s moved, and its content is the same (%s)", what, changed)


def finish_saving(training: Training, folder: RunFolder, keep: int) -> None:
    """Link `best` and delete old checkpoints, if the session before was killed before it did so.

    Only what that session would have deleted is deleted: a lower --checkpoints_total_limit takes effect when a
    checkpoint is written.
    """
    limit = (folder.saved_config() or {}).get("checkpoints_total_limit")
    informing = Informing()
    with informing("the link `best`"):
        checkpoint.relink_best(folder.checkpoints, training.state.best_step)
    if isinstance(limit, int) and not training.state.is_diverging:
        with informing("the folder of the checkpoints", "old checkpoints are deleted later"):
            checkpoint.prune(folder.checkpoints, max(limit, keep))


def check_disk(folder: RunFolder, checkpoint_bytes: int, total_limit: int) -> None:
    """Raise UserError unless the disk has space for the kept checkpoints, `best`, and the one being written."""
    free = shutil.disk_usage(folder.path).free
    used = sum(f.stat().st_size for f in folder.checkpoints.rglob("*") if f.is_file() and not f.is_symlink())
    needed = checkpoint_bytes * (total_limit + 2)
    if needed > free + used:
        raise UserError(
            f"the disk of {folder.path} has {free / 2**30:.2f} GiB free, and {total_limit + 2} checkpoints "
            f"(--checkpoints_total_limit {total_limit}, `best`, and the one being written) need "
            f"{needed / 2**30:.2f} GiB; free space, choose another --output_dir, or lower --checkpoints_total_limit"
        )
