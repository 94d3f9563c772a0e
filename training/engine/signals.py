"""Signals that ask a run to stop: it finishes the step, saves a checkpoint and says how to resume.

Work that has nothing to save (opening data, the first step, an export) is left at once instead, within two seconds.

The exit status is 75 ("requeue this job") after SIGTERM, SIGHUP (a closed terminal or a lost connection) or SIGUSR1
(which clusters send as a warning), and 130 after SIGINT (Ctrl-C).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import psutil

from pipelines.tools.cli import INTERRUPTED_STATUS, REQUEUE_STATUS, signal_main_thread

STARTED_BY = "HALFTONE_STARTED_BY"
"""Environment variable: the process id of the training run that started this process to make an input. This process
ends when that run has ended."""
# Windows has no SIGHUP and no SIGUSR1; other systems have no SIGBREAK.
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGBREAK")
_HANDLED = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
# Under a launcher, a Ctrl-C arrives twice: from the terminal, and passed on by the launcher.
_SAME_CTRL_C_SECONDS = 1.0
# A first step takes long only if it compiles the model or waits for data; otherwise it is completed and saved.
FIRST_STEP_PATIENCE = 0.5
# After this time, a process that has nothing to save is ended although its main thread is still in foreign code.
_LAST_RESORT_SECONDS = 1.0
_WATCH_SECONDS = 0.25
_AGAIN_SECONDS = 0.01


class Interrupted(BaseException):
    """Raised when the process was asked to stop during long work between steps, such as validation or previews.

    Like KeyboardInterrupt, it is not an `Exception`: it can be raised within a library that handles every `Exception`.
    """


class StopSignal:
    """Records that this process was asked to stop; a context manager that restores the previous signal handlers.

    `accelerate launch` exits after a SIGTERM without passing it on, so the end of the launcher is treated as a SIGTERM;
    so is the end of the training run that started this process to make its input (`STARTED_BY`).
    A second Ctrl-C stops the process at once, without saving. A signal that was ignored before, as `nohup` ignores
    SIGHUP, stays ignored. In a thread other than the main one (a notebook, a web interface) nothing is handled, since
    Python allows handlers in the main thread only.
    """

    def __init__(self) -> None:
        self.on_last_resort: Callable[[int], None] | None = None
        """Called with the exit status before the process is ended by `at_once`."""
        self.on_leaving: Callable[[], None] | None = None
        """Called once when this process ends because a process of the run was asked to stop, and cannot wait for the
        others; `RankWatch` calls it after it has told them."""
        self._signal: int | None = None
        self._requested_at = 0.0
        self._interrupted_at = 0.0
        self._patience: float | None = None  # None outside of `at_once`
        self._has_raised = False
        self._leaving = threading.Lock()
        self._previous: dict[int, object] = {}
        self._launcher = _launcher_pid()
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._previous_descriptor = -1
        self._previous_hook = sys.unraisablehook

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            # Python runs handlers when the main thread returns from a call into C, such as an exchange with another
            # process. The descriptor is written to at once, so that the watching thread learns of the signal anyway.
            reader, writer = self._pair = socket.socketpair()
            for end in self._pair:
                end.setblocking(False)
            self._previous_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            for number in _HANDLED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
            self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
            threading.Thread(target=self._watch, args=(reader,), name="stop-signal", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        if self._pair is None:
            return
        signal.set_wakeup_fd(self._previous_descriptor)
        sys.unraisablehook = self._previous_hook
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()
        self._pair[1].close()  # ends the watching thread
        self._pair = None

    @property
    def requested(self) -> int | None:
        """Number of the signal that asked this process to stop, or None."""
        if self._signal is None and self._launcher is not None and os.getppid() != self._launcher:
            self.request(signal.SIGTERM)
        return self._signal

    def request(self, number: int) -> None:
        """Ask this process to stop as if it had received a signal; the first request counts."""
        if self._signal is None:
            self._requested_at = time.monotonic()
            self._signal = number

    def request_here(self, number: int) -> None:
        """Ask this process to stop, from a thread other than the main one."""
        self.request(number)
        if self._pair is not None and self._is_overdue():
            self._interrupt()

    def check(self) -> None:
        """Raise Interrupted if this process was asked to stop."""
        if self.requested is not None:
            raise Interrupted

    @contextmanager
    def at_once(self, patience: float = 0.0) -> Iterator[None]:
        """Leave the block with Interrupted as soon as this process is asked to stop, even in the middle of a call.

        For work that has nothing to save. If the main thread does not leave the block, because it is in foreign code or
        waits for another process, the process is ended. In a thread other than the main one, this only checks at the
        start.

        Args:
            patience: seconds that the block still gets after the request; if it ends within them, nothing is raised.
        """
        if patience == 0.0:
            self.check()
        self._has_raised, self._patience = False, patience
        try:
            yield
        finally:
            with self._leaving:
                self._patience = None

    @staticmethod
    def exit_status(number: int) -> int:
        return INTERRUPTED_STATUS if number == signal.SIGINT else REQUEUE_STATUS

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            again = self._interrupted_at and not (
                self._launcher is not None and now - self._interrupted_at < _SAME_CTRL_C_SECONDS
            )
            if again:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        self.request(number)
        if self._patience is not None:
            if now - self._requested_at >= self._patience:
                self._has_raised = True
                raise Interrupted
        elif number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            # Not `print`, which fails if the signal arrives while the main thread is printing.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.write(
                    sys.stderr.fileno(), b"\nstopping after this step; press Ctrl-C again to stop without saving\n"
                )

    def _on_unraisable(self, caught: Any) -> None:
        """Ask again for the end of `at_once`: its handler ran in a destructor, where Python drops what is raised."""
        if isinstance(caught.exc_value, Interrupted):
            self._has_raised = False
            threading.Timer(_AGAIN_SECONDS, self._interrupt).start()  # this function cannot raise either
        else:
            self._previous_hook(caught)

    def _watch(self, reader: socket.socket) -> None:
        """Notice signals and the end of the launcher while the main thread cannot, and enforce `at_once`."""
        overdue_since: float | None = None
        with reader:
            while True:
                if select.select([reader], [], [], _WATCH_SECONDS)[0]:
                    numbers = reader.recv(256)
                    if not numbers:
                        return
                    for number in set(numbers).intersection(self._previous):
                        self.request(number)
                if not self._is_overdue():
                    overdue_since = None
                elif overdue_since is None:
                    overdue_since = time.monotonic()
                    self._interrupt()
                elif time.monotonic() - overdue_since >= _LAST_RESORT_SECONDS:
                    self._end_process()

    def _is_overdue(self) -> bool:
        """Return whether the main thread should have left the block of `at_once`."""
        patience = self._patience
        return self.requested is not None and patience is not None and time.monotonic() - self._requested_at >= patience

    def _interrupt(self) -> None:
        """Let the handler run in the main thread, which may be waiting in a system call, unless it has done so."""
        with self._leaving:
            if self._patience is None or self._has_raised:
                return
            signal_main_thread(signal.SIGTERM)

    def _end_process(self) -> None:
        status = self.exit_status(self._signal or signal.SIGTERM)
        if self.on_last_resort is not None:
            self.on_last_resort(status)
        logging.shutdown()
        os._exit(status)


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
