"""Long calls of libraries that do not return: run in a thread, so that a request to stop is heard meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.2


def polled(action: Callable[[], T], poll: Callable[[], None]) -> T:
    """Return the result of `action`, which runs in another thread while this one calls `poll` now and then.

    If `poll` raises, the thread is left to itself; it does not keep the process alive.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((action(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        poll()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
