"""Images that stay in their shards: the place of an image as a path, and reading its bytes there.

    /data/00000.tar::000017.jpg@1536+20481          20,481 bytes from byte 1,536 of a tar file
    /data/train-00000.parquet::image@3/41           row 41 of row group 3 of a Parquet file

A row of streamed data has such a path where a row of a folder of images has that of a file.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from collections import OrderedDict
from typing import IO, TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_IN_TAR = re.compile(r"(?P<file>.+?\.tar)::(?P<name>.+)@(?P<offset>\d+)\+(?P<size>\d+)", re.IGNORECASE | re.DOTALL)
_IN_PARQUET = re.compile(r"(?P<file>.+?\.parquet)::(?P<name>.+)@(?P<group>\d+)/(?P<row>\d+)", re.IGNORECASE | re.DOTALL)
_OPEN_FILES = 256
KEPT_BYTES = 2**30
"""Row groups are decoded as a whole, and kept in memory up to this size."""


def place_in_tar(file: str, name: str, offset: int, size: int) -> str:
    return f"{file}::{name}@{offset}+{size}"


def place_in_parquet(file: str, column: str, group: int, row: int) -> str:
    return f"{file}::{column}@{group}/{row}"


def is_place(path: Any) -> TypeGuard[str]:
    """Return whether a path is the place of an image in a shard, and not a file."""
    return isinstance(path, str) and shard_of(path) is not None


def shard_of(path: str) -> str | None:
    """Return the file of the shard that a place is in; None for a path that is not a place."""
    found = "::" in path and (_IN_TAR.fullmatch(path) or _IN_PARQUET.fullmatch(path))
    return found["file"] if found else None


def read_place(path: str) -> bytes:
    """Return the encoded image at a place.

    Raises:
        OSError: the shard is missing or shorter than it was, or has no image there.
    """
    if found := _IN_TAR.fullmatch(path):
        size = int(found["size"])
        content = _bytes_at(found["file"], int(found["offset"]), size)
        if len(content) < size:
            raise OSError(f"the shard {found['file']} is truncated: it ends before byte {found['offset']} + {size}")
        return content
    found = _IN_PARQUET.fullmatch(path)
    assert found is not None
    value = _GROUPS.column(found["file"], found["name"], int(found["group"]))[int(found["row"])].as_py()
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise OSError(f"the shard {found['file']} has no image there")
    return content


def _bytes_at(file: str, offset: int, size: int) -> bytes:
    if sys.platform == "win32":  # it cannot read at a place without moving the position that threads share
        with open(file, "rb") as opened:
            opened.seek(offset)
            return opened.read(size)
    opened = _opened(file)  # a file that nobody refers to is closed, also between the two calls of the next line
    return os.pread(opened.fileno(), size, offset)


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(file: str) -> IO[bytes]:
    """Return a shard that is kept open: on a network file system, to open a file takes as long as to read an image.
    It is closed when nobody uses it any more."""
    return open(file, "rb", buffering=0)


class _RowGroups:
    """The columns of images of the row groups that were read last, up to `KEPT_BYTES`."""

    def __init__(self) -> None:
        self._columns: OrderedDict[tuple[str, str, int], pyarrow.ChunkedArray] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def column(self, file: str, name: str, group: int) -> pyarrow.ChunkedArray:
        key = (file, name, group)
        with self._lock:  # an open Parquet file is read by one thread at a time
            if key not in self._columns:
                column = self._read(*key)
                self._columns[key], self._bytes = column, self._bytes + column.nbytes
                while self._bytes > KEPT_BYTES and len(self._columns) > 1:
                    self._bytes -= self._columns.popitem(last=False)[1].nbytes
            self._columns.move_to_end(key)
            return self._columns[key]

    def _read(self, file: str, name: str, group: int) -> Any:
        import pyarrow

        try:
            return _parquet(file).read_row_group(group, columns=[name], use_threads=False).column(0)
        except (pyarrow.ArrowException, IndexError, ValueError) as error:
            raise OSError(f"the shard {file} cannot be read ({error})") from error


@functools.lru_cache(maxsize=_OPEN_FILES)
def _parquet(file: str) -> pyarrow.parquet.ParquetFile:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)


_GROUPS = _RowGroups()


def _forget_in_child() -> None:
    """A forked process reads with its own lock and files: another thread may hold those of its parent."""
    global _GROUPS
    _GROUPS = _RowGroups()
    _opened.cache_clear()
    _parquet.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
