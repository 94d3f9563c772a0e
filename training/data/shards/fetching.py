"""Receiving what a batch needs of remote shards at the same time, and deciding how much of them at once."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.tools.cli import UserError, in_background
from training.core.blocks import RowBlocks
from training.data.shards import places
from training.data.shards.places import Block, is_received, receive, remote_part

if TYPE_CHECKING:
    from datasets import Dataset

CONNECTIONS = 16
"""Number of parts that a process receives at the same time"""
MOST_READERS = 4
"""With more processes that read the same blocks, each receives its images alone"""
_LOOKED_AT = 64


class RemoteReading:
    """How the images of streamed rows are received.

    Args:
        block_bytes: mean size of a block, or of a row group, of all columns with images.
        block_rows: mean number of rows in a block.
        in_parquet: whether images are in Parquet files, of which row groups are always received as a whole.
    """

    def __init__(self, block_bytes: float, block_rows: float, in_parquet: bool):
        self.block_bytes, self.block_rows, self.in_parquet = block_bytes, block_rows, in_parquet

    @classmethod
    def of(cls, dataset: Dataset, columns: Sequence[str], blocks: RowBlocks) -> RemoteReading | None:
        """Return how the images in `columns` are received; None if they are not in remote shards.

        Args:
            dataset: the rows, with undecoded images.
            blocks: the blocks that the rows are in.
        """
        if not len(dataset) or not is_remote_row(dataset[0], columns):
            return None
        looked_at = np.unique(np.linspace(0, len(dataset) - 1, _LOOKED_AT).astype(int)).tolist()
        sizes, in_parquet = [], False
        for row in dataset.select_columns(list(columns)).select(looked_at):
            parts = [remote_part(_path(row[column]), whole_blocks=True) for column in columns]
            in_parquet |= any(part is not None and part.column is not None for part in parts)
            sizes.append(sum(part.nbytes for part in {part for part in parts if part is not None}))
        return cls(float(np.mean(sizes)), len(dataset) / (len(blocks.starts) - 1), in_parquet)

    def bytes_of(self, rows: int) -> float:
        """Return the bytes of the blocks that a window of this number of rows consists of."""
        return (rows / self.block_rows + 1) * self.block_bytes

    def fits(self, rows: int) -> bool:
        """Return whether the blocks of a window of this number of rows are kept in memory."""
        return self.bytes_of(rows) <= places.KEPT_BYTES

    def problem(self, window: int) -> str | None:
        """Return a sentence if the rows that are shuffled together are received in another way than in whole blocks.

        Raises:
            UserError: their row groups do not fit into memory, so that each of them would be received many times.
        """
        if self.fits(window):
            return None
        most = max(1, int((places.KEPT_BYTES / self.block_bytes - 1) * self.block_rows))
        fact = (
            f"the blocks of the {window:,} rows that are shuffled together (--shuffle_buffer) have about "
            f"{self.bytes_of(window) / 2**30:.1f} GiB, and each process keeps {places.KEPT_BYTES / 2**30:.0f} GiB"
        )
        if not self.in_parquet:
            return f"{fact}: each image is requested alone. With --shuffle_buffer {most} there are fewer requests"
        raise UserError(f"{fact}: each row group would be received many times; give --shuffle_buffer {most}")


def is_remote_row(row: dict[str, Any], columns: Iterable[str]) -> bool:
    """Return whether a row has images in remote shards."""
    return any(remote_part(_path(row[column]), whole_blocks=False) is not None for column in columns)


def prefetch(sources: Iterable[Any], *, whole_blocks: bool) -> None:
    """Receive remote images, so that `read_place` finds them in memory.

    Args:
        sources: undecoded values of `datasets.Image`, some of which may be in remote shards.
        whole_blocks: whether to receive the images beside them as well. With more than `MOST_READERS` processes they
            are not, as each of the processes would receive nearly all blocks.

    Raises:
        RemoteError: an image cannot be received.
    """
    whole_blocks = whole_blocks and _readers() <= MOST_READERS
    parts = {remote_part(_path(source), whole_blocks=whole_blocks): None for source in sources}
    missing = [part for part in parts if part is not None and not is_received(part)]
    if len(missing) == 1:
        receive(missing[0])
    elif missing:
        list(_pool().map(_receive, sorted(missing, key=_by_file)))


def _receive(part: Block) -> None:
    with in_background():
        receive(part)


def _by_file(part: Block) -> tuple[str, int]:
    return part.file, part.start


def _path(source: Any) -> Any:
    return source.get("path") if isinstance(source, dict) and source.get("bytes") is None else None


def _readers() -> int:
    """Return the number of processes that read the data of this run."""
    from torch.utils.data import get_worker_info

    worker = get_worker_info()
    return (worker.num_workers if worker else 1) * int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="shards")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
