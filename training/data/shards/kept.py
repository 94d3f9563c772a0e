"""Parts of shards that are kept in memory: those that were read last, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Kept:
    """Values by key, such as blocks of bytes; the ones that were not used for the longest time are dropped.

    Threads share it. A value is read once, also if several threads need it at the same time.

    Args:
        limit: function that returns the number of bytes that are kept. One value is kept in any case.
    """

    def __init__(self, limit: Callable[[], int]):
        self._limit = limit
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._reading: dict[Hashable, threading.Lock] = {}
        self._bytes, self._lock = 0, threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._values

    @property
    def nbytes(self) -> int:
        """The number of bytes that are kept."""
        return self._bytes

    def get(self, key: Hashable) -> Any:
        """Return a value, or None if it is not there."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def get_or_read(self, key: Hashable, read: Callable[[], tuple[Any, int]], resource: Hashable = None) -> Any:
        """Return a value, and read it first if it is not there.

        Args:
            read: returns the value, and its size in bytes.
            resource: what only one thread at a time may read from, such as an open file; None for the value alone.
        """
        held = (key, None) if resource is None else resource
        with self._lock:
            lock = self._reading.setdefault(held, threading.Lock())
        with lock:
            value = self.get(key)
            if value is None:
                value, size = read()
                self._put(key, value, size)
        if resource is None:
            with self._lock:
                self._reading.pop(held, None)
        return value

    def _put(self, key: Hashable, value: Any, size: int) -> None:
        with self._lock:
            self._bytes += size - self._values.get(key, (None, 0))[1]
            self._values[key] = (value, size)
            while self._bytes > self._limit() and len(self._values) > 1:
                self._bytes -= self._values.popitem(last=False)[1][1]
