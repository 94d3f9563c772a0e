"""Durable writing of one file: a reader sees the complete old content or the complete new one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITING = ".writing-"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` if the block ends without an error.

    The file and its folder are flushed to the disk. After an error, the old file is unchanged and the temporary file is
    deleted. The folder must exist.

    Raises:
        OSError: the file cannot be written; also where a library in Rust reports this by an error of its own.
    """
    path = Path(path)
    temporary = path.with_name(f"{WRITING}{os.getpid()}-{path.name}")
    try:
        with rust_errors_as_os_errors():
            yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder may have been deleted, or the disk may have failed
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_file(path: Path) -> None:
    """Flush the contents of a file to the disk."""
    # Windows flushes only files that are open for writing; elsewhere a file may be flushed that cannot be written.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


@contextmanager
def rust_errors_as_os_errors() -> Iterator[None]:
    """Raise an OSError for an error of a library in Rust (safetensors, tokenizers) that contains a system error."""
    try:
        yield
    except Exception as error:  # SafetensorError, and plain Exception from tokenizers
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
