"""Images that stay in their shards: the place of an image as a path, and reading its bytes there.

    /data/00000.tar::000017.jpg@1536+20481          20,481 bytes from byte 1,536 of a tar file
    /data/train-00000.parquet::image@3/41           row 41 of row group 3 of a Parquet file

A row of streamed data has such a path where a row of a folder of images has that of a file. The shard may be a URL
(see `remote`). The place of an image there also says how much is read at once to read the images beside it:

    https://host/00000.tar#0123456789abcdef::000017.jpg@1536+20481/512+4194304     in a block of 4 MiB from byte 512
    https://host/0.parquet#0123456789abcdef::image@3/41+4194304                    in a row group with 4 MiB of images
"""

from __future__ import annotations

import functools
import os
import re
import sys
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeGuard

from training.data.shards.kept import Kept
from training.data.shards.remote import RemoteError, is_remote, read_range, state_of
from training.data.shards.remote_file import RemoteFile

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_VERSION = r"(?:#[0-9a-f]{16})?"
_IN_TAR = re.compile(
    rf"(?P<file>.+?\.tar{_VERSION})::(?P<name>.+)@(?P<offset>\d+)\+(?P<size>\d+)"
    r"(?:/(?P<start>\d+)\+(?P<length>\d+))?",
    re.IGNORECASE | re.DOTALL,
)
_IN_PARQUET = re.compile(
    rf"(?P<file>.+?\.parquet{_VERSION})::(?P<name>.+)@(?P<group>\d+)/(?P<row>\d+)(?:\+(?P<bytes>\d+))?",
    re.IGNORECASE | re.DOTALL,
)
_OPEN_FILES = 256
_METADATA_BYTES = 2**26
KEPT_BYTES = 2**30
"""Row groups are decoded as a whole, and blocks of remote shards are received as a whole. They are kept in memory up to
this size."""


class Block(NamedTuple):
    """What is read at once of a remote shard: bytes of a tar file, or the images of a row group."""

    file: str
    start: int
    """First byte; of a Parquet file, the number of the row group"""
    nbytes: int
    column: str | None = None
    """Column of a Parquet file"""


def place_in_tar(file: str, name: str, offset: int, size: int, block: tuple[int, int] | None = None) -> str:
    """Return the place of `size` bytes from byte `offset`, with the first byte and the number of bytes of its block."""
    return f"{file}::{name}@{offset}+{size}" + (f"/{block[0]}+{block[1]}" if block else "")


def place_in_parquet(file: str, column: str, group: int, row: int, nbytes: int | None = None) -> str:
    """Return the place of a row, with the number of bytes that its row group has in this column."""
    return f"{file}::{column}@{group}/{row}" + (f"+{nbytes}" if nbytes is not None else "")


def is_place(path: Any) -> TypeGuard[str]:
    """Return whether a path is the place of an image in a shard, and not a file."""
    return isinstance(path, str) and shard_of(path) is not None


def shard_of(path: str) -> str | None:
    """Return the file of the shard that a place is in; None for a path that is not a place."""
    found = "::" in path and (_IN_TAR.fullmatch(path) or _IN_PARQUET.fullmatch(path))
    return found["file"] if found else None


def remote_part(path: Any, *, whole_blocks: bool) -> Block | None:
    """Return what has to be received to read the image at a place; None if it is not in a remote shard.

    Args:
        whole_blocks: whether to receive the images beside it in a tar file as well. Of a Parquet file, row groups are
            always received as a whole.
    """
    if not isinstance(path, str) or not is_remote(path):
        return None
    if found := _IN_TAR.fullmatch(path):
        block = whole_blocks and found["start"] is not None
        start, nbytes = (found["start"], found["length"]) if block else (found["offset"], found["size"])
        return Block(found["file"], int(start), int(nbytes))
    found = _IN_PARQUET.fullmatch(path)
    return found and Block(found["file"], int(found["group"]), int(found["bytes"] or 0), found["name"])


def receive(part: Block) -> None:
    """Read a part of a remote shard into memory, unless it is there.

    Raises:
        RemoteError: it cannot be read.
    """
    if part.column is not None:
        _column(part.file, part.column, part.start)
    else:
        _KEPT.get_or_read((part.file, part.start, part.nbytes), lambda: _bytes_of(part))


def is_received(part: Block) -> bool:
    """Return whether a part of a remote shard is in memory."""
    return (part.file, part.column or part.start, part.start if part.column else part.nbytes) in _KEPT


def read_place(path: str) -> bytes:
    """Return the encoded image at a place.

    Raises:
        OSError: the shard is missing or shorter than it was, or has no image there.
        RemoteError: the shard is a URL that cannot be read.
    """
    if found := _IN_TAR.fullmatch(path):
        offset, size = int(found["offset"]), int(found["size"])
        if is_remote(path):
            return _from_remote_tar(found)
        content = _bytes_at(found["file"], offset, size)
        if len(content) < size:
            raise OSError(f"the shard {found['file']} is truncated: it ends before byte {offset} + {size}")
        return content
    found = _IN_PARQUET.fullmatch(path)
    assert found is not None
    value = _column(found["file"], found["name"], int(found["group"]))[int(found["row"])].as_py()
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise OSError(f"the shard {found['file']} has no image there")
    return content


def _from_remote_tar(found: re.Match[str]) -> bytes:
    file, offset, size = found["file"], int(found["offset"]), int(found["size"])
    if found["start"] is not None:
        start, length = int(found["start"]), int(found["length"])
        block = _KEPT.get((file, start, length))
        if block is not None:
            return block[offset - start : offset - start + size]
    alone = _KEPT.get((file, offset, size))
    return alone if alone is not None else _bytes_of(Block(file, offset, size))[0]


def _bytes_of(part: Block) -> tuple[bytes, int]:
    content = read_range(part.file, part.start, part.start + part.nbytes)
    if len(content) < part.nbytes:
        raise RemoteError(f"the shard {part.file} is truncated: it ends before byte {part.start} + {part.nbytes}")
    return content, part.nbytes


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


def _column(file: str, name: str, group: int) -> pyarrow.ChunkedArray:
    """Return a column of images of a row group, which is kept in memory."""
    import pyarrow

    remote = is_remote(file)

    def read() -> tuple[pyarrow.ChunkedArray, int]:
        try:
            opened = _remote_parquet(file) if remote else _parquet(file)
            column = opened.read_row_group(group, columns=[name], use_threads=False).column(0)
        except (pyarrow.ArrowException, IndexError, ValueError) as error:
            raise OSError(f"the shard {file} cannot be read ({error})") from error
        return column, column.nbytes

    # An open Parquet file has one reader at a time. Each reader of a remote one opens it for itself.
    return _KEPT.get_or_read((file, name, group), read, resource=None if remote else file)


@functools.lru_cache(maxsize=_OPEN_FILES)
def _parquet(file: str) -> pyarrow.parquet.ParquetFile:
    return open_parquet(file)


def _remote_parquet(file: str) -> pyarrow.parquet.ParquetFile:
    """Open a remote Parquet file for one reading. Only its metadata are kept: an open file keeps what it has received
    of its row groups, beside the ones that are kept in memory here."""

    def read() -> tuple[tuple[int, pyarrow.parquet.FileMetaData], int]:
        size = state_of(file, patient=True).size
        with open_parquet(file, size) as opened:
            return (size, opened.metadata), opened.metadata.serialized_size

    size, metadata = _METADATA.get_or_read(file, read)
    return open_parquet(file, size, metadata)


def open_parquet(
    file: str, size: int | None = None, metadata: pyarrow.parquet.FileMetaData | None = None
) -> pyarrow.parquet.ParquetFile:
    """Open a Parquet file, or a remote one, of which only what is needed is received.

    Args:
        size: size of a remote file in bytes.
        metadata: its metadata, if they are known.
    """
    import pyarrow.parquet

    if size is None:
        return pyarrow.parquet.ParquetFile(file)
    return pyarrow.parquet.ParquetFile(RemoteFile(file, size, read_ahead=False), metadata=metadata, pre_buffer=True)


_KEPT = Kept(lambda: KEPT_BYTES)
_METADATA = Kept(lambda: _METADATA_BYTES)


def forget() -> None:
    """Drop what is kept in memory, and close the shards. A forked process reads with its own locks and files: another
    thread may hold those of its parent."""
    global _KEPT, _METADATA
    _KEPT = Kept(lambda: KEPT_BYTES)
    _METADATA = Kept(lambda: _METADATA_BYTES)
    _opened.cache_clear()
    _parquet.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
