"""Puts a run folder in order at the start of a session, after a killed process or a program that copied the run."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from pipelines.tools.checkpoint_links import LINKS, MANIFEST, STATE_FILE, linked_checkpoint
from training.core.files import REPLACED, WRITING, delete_leftovers, read_json_object, recover_folder
from training.run import checkpoint
from training.run.checkpoint import DELETING
from training.run.folder import RunFolder

logger = logging.getLogger("halftone")


def put_in_order(folder: RunFolder) -> None:
    """Delete or restore what killed processes left, and link the checkpoints again.

    Only the process that has the lock of the folder may call it.
    """
    recover_folder(folder.pipeline)
    for part in (folder.path, folder.samples, folder.checkpoints):
        delete_leftovers(part)
    clear_leftovers(folder.checkpoints)
    for name in LINKS:
        _link_copy(folder.checkpoints, name)
        _link_again(folder.checkpoints, name)


def clear_leftovers(checkpoints: Path) -> None:
    """Delete what a killed process was writing or deleting, and restore what it was replacing."""
    for prefix in (REPLACED, WRITING):
        for leftover in checkpoints.glob(f"{prefix}*"):
            recover_folder(checkpoints / leftover.name.removeprefix(prefix))
    for leftover in checkpoints.glob(f"{DELETING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _link_again(checkpoints: Path, name: str) -> None:
    """Make the link `latest` or `best` where it is missing, because the disk failed or a copy left links out."""
    meant = linked_checkpoint(checkpoints, name)
    if meant is not None and not os.path.lexists(checkpoints / name):
        with suppress(OSError):  # the checkpoint is found without a link, too
            checkpoint.link(checkpoints, name, meant)


def _link_copy(checkpoints: Path, name: str) -> None:
    """Replace a folder `latest` or `best`, which a program that copied the run has made of the link, by a link.

    The copy is deleted only if the checkpoint itself exists and is undamaged; otherwise it becomes the checkpoint.
    """
    copy = checkpoints / name
    if copy.is_symlink() or not copy.is_dir():
        return
    step = (read_json_object(copy / STATE_FILE) or {}).get("step")
    if not isinstance(step, int) or not checkpoint.is_undamaged(copy):
        logger.warning("%s is not a complete checkpoint; it was renamed to %s", copy, checkpoint.set_aside(copy).name)
        return
    original = checkpoint.checkpoint_of_step(checkpoints, step)
    if original.is_dir() and checkpoint.is_undamaged(original):
        if (copy / MANIFEST).read_bytes() == (original / MANIFEST).read_bytes():
            checkpoint.delete(copy)
        else:
            logger.warning("%s differs from %s; it was renamed to %s", copy, original.name, checkpoint.set_aside(copy))
    else:
        if os.path.lexists(original):
            checkpoint.set_aside(original)
        copy.rename(original)
    checkpoint.link(checkpoints, name, original)
