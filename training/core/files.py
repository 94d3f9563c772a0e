"""Durable writing of files and folders: a reader sees the complete old content or the complete new one.

Everything is written under a temporary name, flushed to the disk, and renamed; then the folder with that name is
flushed. Therefore a killed process or a power cut leaves no incomplete file or folder under a final name. Everything
that is presented as finished is written by these functions.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipelines.tools.replacing import WRITING, fsync_file, fsync_folder, replacing, rust_errors_as_os_errors

REPLACED = ".replaced-"
FULL_DISK = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""Error numbers of a full disk, and of a quota that is used up"""
# Names of temporary files, `.writing-PID-name` and, in earlier versions, `.name.tmpPID`.
_TEMPORARY_FILE = re.compile(rf"{re.escape(WRITING)}\d+-.+|\..+\.tmp\d+")


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, and rename it to `path` if the block ends without an error.

    An old folder at `path` is deleted only after that. All files are flushed to the disk before. After an error, the
    old folder is unchanged and the temporary one is deleted. A killed process leaves folders that the next call, or
    `recover_folder`, deletes or restores; only one process at a time may write to `path`.

    Raises:
        OSError: the folder cannot be written; also where a library in Rust reports this by an error of its own.
    """
    path = Path(path)
    temporary, old = path.with_name(f"{WRITING}{path.name}"), path.with_name(f"{REPLACED}{path.name}")
    recover_folder(path)
    temporary.mkdir(parents=True)
    try:
        with rust_errors_as_os_errors():
            yield temporary
        flush_tree(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        recover_folder(path)
        raise
    fsync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Clean up after a process that was killed in `replacing_folder(path)`: delete what it was writing, and restore or
    delete what it was replacing."""
    temporary, old = path.with_name(f"{WRITING}{path.name}"), path.with_name(f"{REPLACED}{path.name}")
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def delete_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes in `folder`; no other process may be writing there."""
    for path in folder.glob(".*"):
        if _TEMPORARY_FILE.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            with contextlib.suppress(OSError):
                path.unlink()


def write_atomically(path: str | os.PathLike[str], content: str | bytes | Callable[[IO[bytes]], None]) -> None:
    """Write a file atomically: a text (as UTF-8), bytes, or what a function writes into the open file."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file atomically; the same content gives the same bytes."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON file; None if the file does not exist or is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # ValueError: neither UTF-8 nor JSON
        return None


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if the file does not exist, is damaged, or contains something else."""
    content = read_json(path)
    return content if isinstance(content, dict) else None


def flush_tree(folder: Path) -> None:
    """Flush all files and folders below `folder`, and the folder itself, to the disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync_file(Path(parent, name))
        fsync_folder(Path(parent))
