"""Work that several processes share: each does a part, and all of them get the whole result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Exchange:
    """The place of this process among all processes; the defaults are those of a single process.

    Args:
        rank: number of this process, from 0.
        num_processes: number of all processes.
        gather: returns the values of all processes in order of rank, on every process.
    """

    rank: int = 0
    num_processes: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def map(self, function: Callable[[Sequence[int]], Sequence[T]], count: int, batch_size: int) -> list[T]:
        """Return one result for each number from 0 to count - 1, in order, on every process.

        Args:
            function: returns the results of some numbers; it is called with up to `batch_size` of this process's
                numbers.
        """
        own = range(self.rank, count, self.num_processes)
        results: list[T] = []
        for start in range(0, len(own), batch_size):
            results += function(own[start : start + batch_size])
        whole: list[Any] = [None] * count
        for rank, part in enumerate(self.gather(results)):
            whole[rank :: self.num_processes] = part
        return whole
