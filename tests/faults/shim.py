"""Faults at chosen changes of the file system, in real processes: a small library that is loaded with LD_PRELOAD.

`shim.c` intercepts the calls that change the file system (creating, writing, renaming, deleting, linking, flushing).
It counts those below a folder and, at the k-th one, sends the process a signal, or lets the call fail or wait, as a
full, a broken or a slow disk does. All processes that a command starts share the plan and its count, which are a file
mapped into memory.
"""

from __future__ import annotations

import atexit
import errno
import functools
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).with_name("shim.c")
# The same layout as `struct plan` in shim.c.
PLAN = struct.Struct("1024s1024s8q")


@dataclass(frozen=True)
class Fault:
    """What happens at a change: the process gets a signal, or the call fails with `error` or takes longer.

    Args:
        times: number of faults, the first one at the k-th change; `spacing`: number of changes from one to the next.
    """

    name: str
    signal: int = 0
    error: int = 0
    milliseconds: int = 0
    times: int = 1
    spacing: int = 1


KILL = Fault("SIGKILL", signal=signal.SIGKILL)
TERM = Fault("SIGTERM", signal=signal.SIGTERM)
# Not at neighbouring changes: Python runs its handler between two of its instructions, and two signals that arrive
# before that are one. No library makes more than three changes without returning to Python.
TWO_CTRL_C = Fault("Ctrl-C twice", signal=signal.SIGINT, times=2, spacing=4)
FULL_ONCE = Fault("ENOSPC", error=errno.ENOSPC)
FULL = Fault("ENOSPC from there on", error=errno.ENOSPC, times=1_000_000_000)
BROKEN_ONCE = Fault("EIO", error=errno.EIO)
SLOW = Fault("2 s for each write", milliseconds=2000, times=1_000_000_000)


class Change(NamedTuple):
    """A change of the file system: its number from 1, its operation, and the path below the watched folder."""

    number: int
    operation: str
    path: str


@functools.cache
def library() -> Path:
    """Compile the shim and return the library; a test that needs it is skipped without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler (gcc)")
    folder = tempfile.mkdtemp(prefix="halftone-faults-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = Path(folder) / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", built, SOURCE, "-ldl"], check=True)
    return built


class Plan:
    """The faults of one process and its children; a file that they map."""

    def __init__(self, file: Path):
        self.file, self.log = file, file.with_suffix(".log")
        self.clear()

    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(library()), "FAULT_PLAN": str(self.file)}

    def clear(self) -> None:
        """Watch nothing."""
        self._write(PLAN.pack(b"", b"", 0, 1, 1, 0, 0, 0, 0, 0))

    def watch(self, folder: Path) -> None:
        """Count and list the changes below `folder`."""
        self.log.unlink(missing_ok=True)
        self._write(PLAN.pack(self._bytes(folder), bytes(self.log), 0, 1, 1, 0, 0, 0, 0, 0))

    def arm(self, folder: Path, number: int, fault: Fault) -> None:
        """Let `fault` happen at the change of this number below `folder`."""
        self.log.unlink(missing_ok=True)
        values = (number, fault.times, fault.spacing, fault.signal, fault.error, fault.milliseconds, 0, 0)
        self._write(PLAN.pack(self._bytes(folder), bytes(self.log), *values))

    def changes(self) -> list[Change]:
        """Return the changes since `watch` or `arm`."""
        return list(self._changes())

    def faults(self) -> int:
        """Return how many faults there were."""
        return PLAN.unpack(self.file.read_bytes())[-1]

    def _changes(self) -> Iterator[Change]:
        if self.log.exists():
            for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
                number, operation, path = line.split(" ", 2)
                yield Change(int(number), operation, path)

    @staticmethod
    def _bytes(folder: Path) -> bytes:
        return bytes(folder.resolve())

    def _write(self, content: bytes) -> None:
        with self.file.open("r+b" if self.file.exists() else "w+b") as file:
            file.write(content)  # in place: processes have this file mapped
