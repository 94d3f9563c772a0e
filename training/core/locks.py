"""Locks of folders: only one process at a time writes to a run folder or makes a dataset."""

from __future__ import annotations

import errno
import logging
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO

from pipelines.tools.cli import UserError

try:
    import fcntl
except ImportError:  # Windows lacks these locks, so the check for a second process is skipped there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("halftone")

# What the operating system answers if another process has the lock. Anything else means that this file system has no
# locks (ENOLCK, ENOSYS, ENOTSUP), as on some network mounts.
_HELD_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class FolderLock:
    """An exclusive lock on a file; a context manager. The operating system releases it when the process ends.

    Forked child processes do not inherit it, so that data-loading workers that outlive a killed trainer for some
    seconds do not keep others out.

    Args:
        file: the lock's file; its folder must exist. The file stays there.
        refusal: message of the UserError if another process holds the lock.
    """

    def __init__(self, file: Path, refusal: str):
        self.file, self.refusal = file, refusal
        self._open: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock. On a file system without locks, a warning is logged instead.

        Raises:
            UserError: another process holds the lock.
            OSError: the file cannot be created.
        """
        if fcntl is None:
            return
        while True:
            opened = open(self.file, "a", encoding="utf-8")  # noqa: SIM115 - held until `release`
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _HELD_BY_ANOTHER:
                    opened.close()
                    raise UserError(self.refusal) from None
                logger.warning(
                    "%s cannot be locked (%s); make sure that no other process writes to this folder",
                    self.file.parent,
                    error.strerror,
                )
            if self._is_still_there(opened):
                break
            opened.close()  # another process has renamed the folder in the meantime; this is the lock of the old one
        self._open = opened
        _HELD.add(self)

    def _is_still_there(self, opened: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(opened.fileno()), os.stat(self.file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.release()


_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_HELD):
        lock.release()  # closes the child's descriptor; the parent's keeps the lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
