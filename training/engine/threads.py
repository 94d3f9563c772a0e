"""Gives each CPU thread a core of its own, so that another busy process slows down training only by its share.

Every parallel operation ends when its slowest thread does. Left alone, the scheduler often puts two of our threads on
one core, where they wait for each other, while the other process has a core of its own: on two cores a step then took
3.5 times as long. With one core for each thread it takes twice as long, which is our share (docs/LOG.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A user who sets one of these variables has chosen where threads run.
CHOSEN_BY_USER = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
# Large enough that PyTorch divides an elementwise operation among all threads.
ELEMENTS_PER_THREAD = 200_000


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may use; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def one_thread_per_core(threads: int) -> bool:
    """Return whether to give each of this process's `threads` a core of its own.

    Only a process that uses all cores does so: two processes with fewer threads each would take the same cores.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 or any(name in os.environ for name in CHOSEN_BY_USER):
        return False
    return 1 < threads == len(usable_cores())


def place_worker_threads(threads: int) -> None:
    """Start PyTorch's worker threads, each on a core of its own; the first core is left to the main thread.

    A thread inherits the cores of the one that starts it, and OpenMP starts a thread when a parallel operation first
    needs it. Called before any parallel operation; threads that already run stay where they are.
    """
    if not one_thread_per_core(threads):
        return
    cores = usable_cores()
    try:
        for count in range(2, threads + 1):
            os.sched_setaffinity(0, {cores[count - 1]})
            torch.set_num_threads(count)
            torch.ones(count * ELEMENTS_PER_THREAD).exp_()
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def main_thread_on_its_core(device: torch.device) -> Iterator[None]:
    """Keep the main thread on the first core inside the block, if the worker threads have the others.

    Processes that are forked inside inherit this one core; `training.engine.loading.start_worker` gives them all cores.
    """
    cores = usable_cores()
    if device.type != "cpu" or not one_thread_per_core(torch.get_num_threads()):
        yield
        return
    os.sched_setaffinity(0, {cores[0]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
