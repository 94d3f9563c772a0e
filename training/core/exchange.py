"""Work that several processes share: each does a part, and all of them get the whole result or the same error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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

    def share(self, count: int, batch_size: int) -> list[range]:
        """Return the batches of the numbers from 0 to count - 1 that this process works on.

        A batch consists of the same numbers with any number of processes, because the last digits of what a network
        computes depend on the size of its batch. Results are therefore the same, bit for bit.
        """
        starts = range(0, count, batch_size)[self.rank :: self.num_processes]
        return [range(start, min(start + batch_size, count)) for start in starts]

    def map_batches(self, function: Callable[[Sequence[int]], T], count: int, batch_size: int) -> list[T]:
        """Return one result for each batch of the numbers from 0 to count - 1, in order, on every process.

        Args:
            function: returns the result of a batch; it is called with the batches of this process.
        """
        parts = self.each(lambda: [function(numbers) for numbers in self.share(count, batch_size)])
        whole: list[Any] = [None] * len(range(0, count, batch_size))
        for rank, results in enumerate(parts):
            whole[rank :: self.num_processes] = results
        return whole

    def map(self, function: Callable[[Sequence[int]], Iterable[T]], count: int, batch_size: int) -> list[T]:
        """Return one result for each number from 0 to count - 1, in order, on every process.

        Args:
            function: returns the results of a batch of up to `batch_size` numbers: a list, or a tensor with a row for
                each of them. Return the tensor itself, not a list of its rows: each row would be sent with all of it.
        """
        return [result for batch in self.map_batches(function, count, batch_size) for result in batch]

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function on the main process; return its result on every process."""
        return self.each(lambda: function() if self.is_main else None)[0]

    def each(self, function: Callable[[], Any]) -> list[Any]:
        """Call a function on every process; return the results of all of them in order of rank, on every process."""
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


ALONE = Exchange()
"""The exchange of a process that works alone."""
