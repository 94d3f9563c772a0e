"""The same work for many shards in several threads, which wait for a disk or a network most of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from pipelines.tools.cli import BACKGROUND
from pipelines.tools.progress import watched

T = TypeVar("T")
U = TypeVar("U")


def map_in_threads(function: Callable[[T], U], shards: Sequence[T], threads: int, title: str) -> list[U]:
    """Return the results of a function for each shard, while their progress is shown.

    The first error, or Ctrl-C, ends it at once: the other calls do not begin, and those that have begun, which may
    wait for a server for a minute, go on in the background without being waited for.

    Args:
        title: what is shown beside the progress bar.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=f"{BACKGROUND}-shards")
    try:
        results = [pool.submit(function, shard) for shard in shards]
        for result in watched(as_completed(results), len(results), "shard", title):
            result.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return [result.result() for result in results]
