"""Making a folder of data: by one process at a time, completely or not at all, without losing what was there."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines.tools.cli import UserError
from pipelines.tools.private import expand_home, without_private
from training.core.files import FULL_DISK, flush_tree, recover_folder, replacing_folder, write_json
from training.core.locks import FolderLock
from training.core.made_folders import MANIFEST, dataset_problem, lock_of, read_manifest
from training.engine.signals import StopSignal, started_by

_STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
# How libraries written in Rust report a full disk.
_DISK_FULL_TEXT = f"os error {errno.ENOSPC}"
PARENT_POLL_SECONDS = 0.5
SECONDS_TO_CLEAN_UP = 10.0


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Make `folder` in this block, as the only process that does so, and yield its absolute path.

    What killed makers left beside the folder is deleted first. In this block, SIGTERM and SIGHUP raise SystemExit, so
    that nothing incomplete stays behind, and so does the end of the training run that started this process.

    Raises:
        UserError: another process makes the folder, it cannot be written, or the disk is full.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    lock = lock_of(folder, f"another process is making {folder}; wait for it, or choose another --output_dir")
    with _explained_errors(folder), _stopped_by_signals():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _taken(lock):
            recover_folder(folder)
            shutil.rmtree(folder.with_name(f".{folder.name}.partial"), ignore_errors=True)  # of earlier versions
            yield folder


@contextmanager
def making_cache(folder: Path, job: int = 0, jobs: int = 1) -> Iterator[None]:
    """Write shards to `folder` in this block. Several processes of one launcher may do so, but not two launches.

    Args:
        job: which of several independent jobs this is, from 0; different jobs may write at the same time.
        jobs: number of these jobs.

    Raises:
        UserError: another process writes to the folder, it cannot be written, or the disk is full.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    locked, what = folder, str(folder)
    if jobs > 1:
        locked, what = folder.with_name(f"{folder.name}.job-{job}-of-{jobs}"), f"the share of job {job} in {folder}"
    lock = lock_of(locked, f"another process is making {what}; wait for it, or choose another --output_dir")
    with _explained_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _taken(lock) if os.environ.get("RANK", "0") == "0" else nullcontext():
            yield


@contextmanager
def _taken(lock: FolderLock) -> Iterator[None]:
    """Hold the lock. A run that only looks whether it is held takes it for a moment, so try more than once."""
    for delay in (0.2, 0.4):
        try:
            lock.acquire()
            break
        except UserError:
            time.sleep(delay)
    else:
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield an empty folder to write into, which takes the place of `folder` at the end of the block.

    Yields:
        The empty folder, and a list that receives the new path of what was in `folder`, which is renamed.
    """
    aside: list[Path] = []
    with replacing_folder(folder) as partial:
        yield partial, aside
        flush_tree(partial)  # before the old folder is renamed, so that the path is without a folder for a moment only
        if folder.is_dir() and any(folder.iterdir()):
            names = (folder.with_name(f"{folder.name}_old_{number}") for number in itertools.count(1))
            aside.append(folder.rename(next(name for name in names if not name.exists())))


def check_replaceable(folder: Path, script: str, noun: str, overwrite: bool) -> None:
    """Check that `folder` is missing or empty, or that it holds a dataset of `script` that may be set aside.

    A dataset that is not complete may always be set aside.

    Args:
        folder: the folder to write.
        script: the script that makes it, such as make_emoji.py.
        noun: what the dataset is called in messages, such as "emoji".
        overwrite: whether a complete dataset may be set aside.

    Raises:
        UserError: `folder` holds something else, or a complete dataset and `overwrite` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; choose a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not is_made_by(folder, script):
        raise UserError(
            f"--output_dir {folder} is not empty and holds no {noun} made by {script}; choose another folder, or move "
            "its contents"
        )
    problem = dataset_problem(folder)
    if problem:
        print(f"{folder} {problem}, so it is made again.")
    elif not overwrite:
        raise UserError(
            f"--output_dir {folder} already holds {noun}; choose another folder, or set the existing one aside with "
            "--overwrite true"
        )


def is_made_by(folder: Path, script: str) -> bool:
    """Return whether the dataset in `folder` was made by this script, complete or not."""
    manifest = read_manifest(folder)
    if manifest is not None:
        made_by = manifest.get("made_by") or manifest["settings"].get("made_by")  # earlier versions: in the settings
        return made_by == script or (made_by is None and script == "make_posters.py")
    # Without a manifest: nothing but the files that the script writes, as after a power cut, or of an earlier version.
    entries = {path.name for path in folder.iterdir()}
    return "contact_sheet.png" in entries and entries <= {"data", "README.md", "contact_sheet.png", MANIFEST}


def write_manifest(folder: Path, script: str, settings: dict[str, Any], files: Iterable[Path]) -> None:
    """Record the script and the settings that the dataset was made with, and the sizes of its `files`.

    The manifest must be written last, because its presence marks the dataset as complete.
    """
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(files)}
    write_json(folder / MANIFEST, {"made_by": script, "settings": without_private(settings), "files": sizes})


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings that the dataset in `folder` was made with, or None if no complete one exists."""
    manifest = read_manifest(folder)
    return expand_home(manifest["settings"]) if manifest and dataset_problem(folder) is None else None


@contextmanager
def _explained_errors(folder: Path) -> Iterator[None]:
    """Convert errors of the file system to a UserError that names the disk or the file."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL_DISK or _DISK_FULL_TEXT in str(error):
            raise UserError(
                f"the disk of {folder} is full ({_free_bytes(folder) / 1e6:,.1f} MB are free); make room, or choose "
                "another --output_dir. Nothing incomplete was left"
            ) from error
        if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):  # the reader of stdout is gone
            raise
        file = f", at {error.filename}" if error.filename else ""
        reason = f"{error.strerror or error}{file}"
        raise UserError(f"--output_dir {folder} cannot be written ({reason}); choose another folder") from error


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise SystemExit in the main thread for SIGTERM and SIGHUP, unless ignored, and when the parent has ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(StopSignal.exit_status(number))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {n: signal.signal(n, stop) for n in _STOPPING if signal.getsignal(n) is not signal.SIG_IGN}
    over = threading.Event()
    parent = started_by()
    if parent is not None:
        threading.Thread(target=_stop_with, args=(parent, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop_with(parent: int, over: threading.Event) -> None:
    """Stop this process when process `parent`, which started it, has ended."""
    while os.getppid() == parent:
        if over.wait(PARENT_POLL_SECONDS):
            return
    os.kill(os.getpid(), signal.SIGTERM)
    if not over.wait(SECONDS_TO_CLEAN_UP):  # the main thread is in a library that does not return
        os._exit(StopSignal.exit_status(signal.SIGTERM))
