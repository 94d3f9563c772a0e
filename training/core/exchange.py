"""Work that several processes share: each does a part, and all of them get the whole result or the same error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines.tools.cli import UserError

T = TypeVar("T")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Exchange:
    """The place of this process among all processes; the defaults are those of a single process.

    One of the `shared_errors` in the part of one process is raised on every process, after all of them have come to the
    end of their parts. Any other error ends the process where it happens, and the launcher then ends the others.

    Args:
        rank: number of this process, from 0.
        num_processes: number of all processes.
        gather: returns the values of all processes in order of rank, on every process.
        shared_errors: types of errors that all processes raise together.
    """

    rank: int = 0
    num_processes: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    shared_errors: tuple[type[BaseException], ...] = (UserError,)

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

        def part() -> list[T]:
            return [
                result
                for start in range(0, len(own), batch_size)
                for result in function(own[start : start + batch_size])
            ]

        whole: list[Any] = [None] * count
        for rank, results in enumerate(self._together(part)):
            whole[rank :: self.num_processes] = results
        return whole

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function on the main process; return its result on every process."""
        return self._together(lambda: function() if self.is_main else None)[0]

    def _together(self, function: Callable[[], Any]) -> list[Any]:
        error: BaseException | None = None
        result = None
        try:
            result = function()
        except self.shared_errors as raised:
            error = raised
        outcomes = self.gather((result, error))
        if error is not None:
            raise error
        for _, other in outcomes:
            if other is not None:
                raise other
        return [result for result, _ in outcomes]
