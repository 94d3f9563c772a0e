"""A remote file as Python's file object, for libraries that read the index of a shard."""

from __future__ import annotations

import io

from training.data.shards.remote import read_range

_FEW_BYTES, _MOST_BYTES = 2**16, 2**23
# Bytes between two reads that are received as well: at 100 Mbit/s they take as long as another request.
_LARGEST_GAP_READ = 2**20


class RemoteFile(io.RawIOBase):
    """A remote file that is read forward, as the headers of a tar file are, or in the ranges that are asked for.

    Reading ahead adapts to the file: while what is skipped is small, as between the headers of small images, the file
    is received as it is, in up to 8 MiB at once; images of megabytes are left out.

    Args:
        url: the file (see `remote`), with its version.
        size: its size in bytes.
        read_ahead: whether more may be received than is asked for.
    """

    def __init__(self, url: str, size: int, *, read_ahead: bool):
        super().__init__()
        self._url, self._size, self._read_ahead = url, size, read_ahead
        self._place, self._start, self._kept, self._ahead = 0, 0, b"", _FEW_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def size(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readall(self) -> bytes:
        return self.read(self._size)

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._place + size, self._size)
        if self._place >= stop:
            return b""
        if not self._start <= self._place <= stop <= self._start + len(self._kept):
            self._receive(stop)
        content = self._kept[self._place - self._start : stop - self._start]
        self._place += len(content)
        return content

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _receive(self, stop: int) -> None:
        """Receive the bytes from the current place up to `stop`, and some after them."""
        skipped = self._place - self._start - len(self._kept)
        small = 0 <= skipped < _LARGEST_GAP_READ
        self._ahead = min(2 * self._ahead, _MOST_BYTES) if small else _FEW_BYTES
        end = max(stop, self._place + self._ahead) if self._read_ahead else stop
        self._start, self._kept = self._place, read_range(self._url, self._place, min(end, self._size))
