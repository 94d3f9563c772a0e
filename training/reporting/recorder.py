"""Calls one tracker on a thread of its own, so that a slow tracker does not slow down training."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

from pipelines.tools.cli import BACKGROUND, cause
from training.reporting.backends import Backend, Notify

# After this number of failures in a row, a tracker is no longer used: each failed call may take a network timeout.
FAILURES_BEFORE_GIVING_UP = 3
# Calls that wait for a slow tracker; further ones are left out. Grids of samples, the largest, are a few MB each.
MOST_WAITING = 500


class Recorder:
    """Calls one tracker on a thread, in the order of the calls. Its methods never raise and do not wait."""

    def __init__(self, backend: Backend, notify: Notify):
        self.name = backend.name
        self.in_use = True
        self.ended = threading.Event()
        self._backend, self._notify = backend, notify
        self._actions: queue.Queue[Callable[[Backend], None] | None] = queue.Queue(MOST_WAITING)
        self._failures = 0  # in a row
        self._warned = False
        self._finishing = False
        threading.Thread(target=self._work, name=f"{BACKGROUND}-{self.name}", daemon=True).start()

    def record(self, action: Callable[[Backend], None]) -> None:
        """Call `action` with the tracker after all earlier ones. If too many are waiting, it is left out."""
        if not self.in_use:
            return
        try:
            self._actions.put_nowait(action)
        except queue.Full:
            self._warn(f"{self.name} is too slow, and some values are not recorded there (metrics.csv has all of them)")

    def finish(self) -> None:
        """Close the tracker after what is waiting; `ended` is then set."""
        self._finishing = True
        with contextlib.suppress(queue.Full):  # then the thread finishes after the last of the waiting actions
            self._actions.put_nowait(None)

    def leave_behind(self) -> None:
        """Give the tracker up although it is still at work."""
        self.in_use = False
        self._notify(f"warning: {self.name} did not answer in time; its last values may be missing")

    def _work(self) -> None:
        while self.in_use and not (self._finishing and self._actions.empty()):
            action = self._actions.get()
            if action is not None:
                self._call(action)
        if self.in_use:
            self._call(lambda backend: backend.finish())
        self.ended.set()

    def _call(self, action: Callable[[Backend], None]) -> None:
        try:
            action(self._backend)
        except Exception as error:  # a failing tracker must not end the run
            self._failures += 1
            self._warn(f"{self.name} failed and records nothing from now on: {cause(error)}")
            self.in_use = self._failures < FAILURES_BEFORE_GIVING_UP
        else:
            self._failures = 0

    def _warn(self, sentence: str) -> None:
        if not self._warned:
            self._warned = True
            self._notify(f"warning: {sentence}")
