"""Asked to stop: finish the step, save, say how to go on.

SIGTERM and SIGUSR1 (a cluster's warning) end in exit status 75, "requeue me"; SIGINT (Ctrl-C) in 130.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

import psutil

REQUEUE_STATUS = 75
_HANDLED = (signal.SIGTERM, signal.SIGINT) + ((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ())


class Interrupted(Exception):
    """A stop was asked for in the middle of validation, previews or the like."""


class StopSignal:
    """Remembers that somebody asked this process to stop; a context manager that restores the handlers it found.

    `accelerate launch` dies of a SIGTERM without passing it on, so the end of a launcher counts as SIGTERM too.
    A second Ctrl-C stops at once, without saving.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}
        self._launcher = _launcher_pid()

    def __enter__(self) -> StopSignal:
        for number in _HANDLED:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @property
    def requested(self) -> int | None:
        """The signal's number, or None when nobody asked."""
        if self._signal is None and self._launcher is not None and os.getppid() != self._launcher:
            self._signal = signal.SIGTERM
        return self._signal

    def check(self) -> None:
        """Raise Interrupted when a stop was asked for."""
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


def ignore_interrupts(worker_id: int = 0) -> None:
    """For data-loading workers: Ctrl-C reaches the whole group, and only the trainer should answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def launcher_command() -> list[str]:
    """The command line of the parent process if that is `accelerate launch` or `torchrun`, else nothing."""
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


def _launcher_pid() -> int | None:
    return os.getppid() if launcher_command() else None
