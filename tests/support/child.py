"""Child processes that are forked from the test's own, which saves the seconds of starting an interpreter.

In a child, system calls can be refused as some file systems refuse them, by a filter of the kernel (seccomp).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

# Numbers of system calls, by machine. A machine without `symlink` has only `symlinkat`.
NUMBERS = {
    "x86_64": {"symlink": 88, "symlinkat": 266, "flock": 73},
    "aarch64": {"symlinkat": 36, "flock": 32},
}
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # instructions of the filter
ALLOW, REFUSE = 0x7FFF0000, 0x00050000

can_refuse = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in NUMBERS, reason="needs the filters of Linux for system calls"
)


class Child:
    """A forked process that calls `action`, with stdout and stderr in a file. Its status is that of `action`."""

    def __init__(self, action: Callable[[], int | None], output: Path):
        self.output = output
        self._status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(action)

    def wait(self) -> int:
        """Return the exit status, or the negative number of the signal that ended the process."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def has_ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def _run(self, action: Callable[[], int | None]) -> None:
        status = 1
        try:
            send_output_to(os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            status = action() or 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)


def send_output_to(descriptor: int, *names: str) -> None:
    """Replace stdout and stderr (or only `names`) of this process, also the streams that pytest has put there."""
    for name in names or ("stdout", "stderr"):
        number = {"stdout": 1, "stderr": 2}[name]
        os.dup2(descriptor, number)
        stream = open(number, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115 - until the end
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def in_child(action: Callable[[], int | None], output: Path) -> tuple[int, str]:
    """Call `action` in a forked process; return its status and what it printed."""
    child = Child(action, output)
    return child.wait(), child.text()


def refuse(error: int, *names: str) -> None:
    """Make the system calls `names` fail with `error` in this process and its children, for good."""
    numbers = [NUMBERS[platform.machine()][name] for name in names if name in NUMBERS[platform.machine()]]
    code = [(LOAD, 0, 0, 0)]
    for number in numbers:
        code += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | error)]
    code.append((RETURN, 0, 0, ALLOW))
    raw = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in code))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]

    program = Program(len(code), ctypes.addressof(raw))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def refuse_symbolic_links() -> None:
    """Make this process live on a file system without symbolic links, which answers EPERM as FAT and exFAT do."""
    refuse(errno.EPERM, "symlink", "symlinkat")


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)
