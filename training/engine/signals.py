"""Signals that ask a run to stop: it finishes the step, saves a checkpoint and says how to resume.

The exit status is 75 ("requeue this job") after SIGTERM, SIGHUP (a closed terminal or a lost connection) or SIGUSR1
(which clusters send as a warning), and 130 after SIGINT (Ctrl-C).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

import psutil

REQUEUE_STATUS = 75
STARTED_BY = "HALFTONE_STARTED_BY"
"""Environment variable with the id of the process that started this one, and without which it is not needed."""
# Windows has no SIGHUP and no SIGUSR1.
_HANDLED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(Exception):
    """Raised when the process was asked to stop during long work between steps, such as validation or previews."""


class StopSignal:
    """Records that this process was asked to stop; a context manager that restores the previous signal handlers.

    `accelerate launch` exits after a SIGTERM without passing it on, so the end of the launcher is treated as a SIGTERM;
    so is the end of the training run that started this process to make its input (`STARTED_BY`).
    A second Ctrl-C stops the process at once, without saving. A signal that was ignored before, as `nohup` ignores
    SIGHUP, stays ignored. In a thread other than the main one (a notebook, a web interface) nothing is handled, since
    Python allows handlers in the main thread only.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}
        self._launcher = _launcher_pid()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @property
    def requested(self) -> int | None:
        """Number of the signal that asked this process to stop, or None."""
        if self._signal is None and self._launcher is not None and os.getppid() != self._launcher:
            self._signal = signal.SIGTERM
        return self._signal

    def check(self) -> None:
        """Raise Interrupted if this process was asked to stop."""
        if self.requested is not None:
            raise Interrupted

    @staticmethod
    def exit_status(number: int) -> int:
        return 130 if number == signal.SIGINT else REQUEUE_STATUS

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            print("\nstopping after this step; press Ctrl-C again to stop without saving", file=sys.stderr, flush=True)


def leave_signals_to_the_trainer(worker_id: int = 0) -> None:
    """Ignore the signals in a data-loading worker; the trainer ends its workers when it has stopped.

    Terminals, schedulers and service managers send them to the whole group of processes. Workers that died of them
    would take with them the step that the trainer is about to finish and save.
    """
    for number in _HANDLED:
        signal.signal(number, signal.SIG_IGN)


def launcher_command() -> list[str]:
    """Return the parent's command line if the parent is `accelerate launch` or `torchrun`, otherwise an empty list."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []
    names = {os.path.basename(word) for word in words[:4]}
    is_launcher = names & {"accelerate", "torchrun", "accelerate-launch"} or any(
        word in ("torch.distributed.run", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")
        for word in words[:6]
    )
    return words if is_launcher else []


def started_by() -> int | None:
    """Return the id of the training run or quickstart that started this process, if any; asked once.

    The variable is removed, so that processes that this one starts do not inherit it.
    """
    number = os.environ.pop(STARTED_BY, "")
    return int(number) if number.isdecimal() and os.name == "posix" else None


def _launcher_pid() -> int | None:
    return started_by() or (os.getppid() if launcher_command() else None)
