"""Atomic writing of files: into a temporary file, which is flushed to the disk and then renamed.

A reader sees either the complete old file or the complete new one, also after a crash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` if the block ends without an error.

    The file and its folder are flushed to the disk, so that a power cut leaves either the old file or the new one.
    After an error, the old file is unchanged and the temporary file is deleted. The folder must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


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


def fsync_folder(folder: Path) -> None:
    """Flush the folder's entries (the names of its files) to the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders, but journals renames
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
