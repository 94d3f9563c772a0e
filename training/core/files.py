"""Durable writing of files and folders: a reader sees the complete old content or the complete new one.

Everything is written under a temporary name, flushed to the disk, and renamed; then the folder with that name is
flushed. Therefore a killed process or a power cut leaves no incomplete file or folder under a final name. Everything
that is presented as finished is written by these functions.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

WRITING = ".writing-"
REPLACED = ".replaced-"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` if the block ends without an error.

    The file and its folder are flushed to the disk. After an error, the old file is unchanged and the temporary file is
    deleted. The folder must exist.
    """
    path = Path(path)
    temporary = path.with_name(f"{WRITING}{os.getpid()}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, and rename it to `path` if the block ends without an error.

    An old folder at `path` is deleted only after that. All files are flushed to the disk before. After an error, the
    old folder is unchanged and the temporary one is deleted. A killed process leaves folders that the next call, or
    `recover_folder`, deletes or restores; only one process at a time may write to `path`.
    """
    path = Path(path)
    temporary, old = path.with_name(f"{WRITING}{path.name}"), path.with_name(f"{REPLACED}{path.name}")
    recover_folder(path)
    temporary.mkdir(parents=True)
    try:
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


def flush_tree(folder: Path) -> None:
    """Flush all files and folders below `folder`, and the folder itself, to the disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            with Path(parent, name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(parent))


def fsync_folder(folder: Path) -> None:
    """Flush the folder's entries (the names of its files) to the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders, but journals renames
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems do not flush folders
        pass
    finally:
        os.close(descriptor)
