"""Files that a reader, or a crash, finds either whole or not there: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there takes its place when the block ends without an error.

    File and folder are flushed to the disk, so that a power cut leaves the old file or the new one. The folder must
    exist. After an error the old file is untouched and the temporary one is gone.
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
    """Write a file whole or not at all: a text (as UTF-8), bytes, or whatever a function writes into an open file."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON whole or not at all; the same content gives the same bytes."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def fsync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders; its renames are journalled
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
