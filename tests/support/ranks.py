"""Runs of several processes that are started one by one, as `srun` does, so that each exit status can be seen."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.child import Child
from tests.support.forks import Fork, environment, warm_interpreter


def start_ranks(script: Path, flags: Sequence[str], count: int = 2) -> list[Fork]:
    """Start `count` processes of one run, as forks of the shared interpreter."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    return [
        warm_interpreter().start(
            script,
            *flags,
            env=environment(**shared, MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(count)
    ]


def outcomes(processes: list[Fork], seconds: float = 90) -> tuple[list[int], str]:
    """Wait for all processes; return their exit statuses and everything that they printed to stderr."""
    deadline = time.monotonic() + seconds
    try:
        statuses = [process.wait(max(1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return statuses, "".join(process.stderr for process in processes)


def wait_for(condition: Callable[[], bool], processes: list[Fork], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.output
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fork_ranks(action: Callable[[], int | None], output: Path, count: int, **variables: str) -> tuple[list[int], str]:
    """Call `action` in `count` forked processes of one run, which saves the seconds of starting interpreters.

    Args:
        output: file that gets what the first process prints; the others have files beside it.
        variables: further environment variables of each process.

    Returns:
        The exit statuses, and everything that the processes printed.
    """
    children = started_ranks(action, output, count, **variables)
    statuses = [child.wait() for child in children]
    return statuses, "\n".join(child.text() for child in children)


def started_ranks(action: Callable[[], int | None], output: Path, count: int, **variables: str) -> list[Child]:
    """Start what `fork_ranks` waits for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", **variables}

    def of_rank(rank: int) -> int | None:
        os.environ.update(shared, MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
        return action()

    return [
        Child(functools.partial(of_rank, rank), output.with_suffix(f".{rank}.txt" if rank else ".txt"))
        for rank in range(count)
    ]


def forked_ranks(action: Callable[[], int], output: Path, count: int, **variables: str) -> None:
    """Call `action` as `fork_ranks` does; every process must succeed."""
    statuses, text = fork_ranks(action, output, count, **variables)
    assert statuses == [0] * count, text
