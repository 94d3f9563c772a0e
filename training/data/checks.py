"""Checks of the rows before training: broken images, empty captions and invalid labels, in one pass.

N rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL

from pipelines.tools.cli import UserError
from pipelines.tools.commands import command
from pipelines.tools.files import max_image_pixels
from training.data.fingerprints import evenly_spaced, rows_of_some_blocks
from training.data.images import BadSample, ImageDataset
from training.data.records import read_record, write_record
from training.data.shards.fetching import prefetch
from training.data.transforms import BrokenImage, open_image, verify_image

CHECK = command("data_scripts/check_dataset.py")
# Before training, every row of a dataset of up to SCAN_ROWS rows is checked, as far as SCAN_SECONDS allow.
SCAN_ROWS = 20_000
SCAN_SECONDS = 10.0
_SHOWN = 10
_CHUNK_ROWS = 256
# All images of a chunk are read before a request to stop is heard.
IMAGE_CHUNK_ROWS = 32
SCAN_VERSION = 2
"""Increased whenever the same rows may have other problems than before."""
# Images with more pixels are decoded one at a time, because each takes hundreds of MB.
LARGE_IMAGE_PIXELS = 16_000_000
_LARGE_IMAGE = threading.Lock()


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row."""

    row: int
    where: str
    column: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}, column '{self.column}': {self.reason}"


@dataclass
class ScanReport:
    """Result of a scan of the data; `problems` are in the order of the rows."""

    rows: int
    images_checked: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.images_checked == self.rows


def scan(
    dataset: ImageDataset,
    *,
    max_rows: int = SCAN_ROWS,
    seconds: float = SCAN_SECONDS,
    shard: tuple[int, int] = (0, 1),
    poll: Callable[[], None] = lambda: None,
) -> ScanReport:
    """Check captions, labels and images of all rows, or of `max_rows` evenly spaced rows if there are more.

    Args:
        seconds: time limit for decoding images; they are decoded in an order that covers the dataset evenly. Of remote
            data that do not fit into memory, images of some blocks are decoded (see `rows_of_some_blocks`).
        shard: (rank, number of processes); each process checks its share of the rows.
        poll: called now and then; it may raise to stop.
    """
    key = _record_key(dataset, max_rows, seconds, shard)
    known = read_record("scan", key) if key else None
    if isinstance(known, list) and len(known) == 2:
        return ScanReport(*known)
    report = _read_rows(dataset, max_rows, seconds, shard, poll)
    if key and not report.problems:
        write_record("scan", key, [report.rows, report.images_checked])
    return report


def _record_key(dataset: ImageDataset, max_rows: int, seconds: float, shard: tuple[int, int]) -> list[Any] | None:
    """Return everything that the result of a scan depends on; None if the rows are not in files."""
    rows = dataset.stored_rows_key
    if rows is None:
        return None
    companions = [[type(c).__name__, c.columns, vars(c).get("num_classes")] for c in dataset.companions.values()]
    labels = dataset.label_map.names if dataset.label_map else None
    config = dataset.config
    columns = [config.image_column, config.caption_column, config.label_column, dataset.quick_columns]
    about = [type(dataset).__name__, dataset.captions, labels, companions, *columns]
    return [rows, *about, max_rows, seconds, list(shard), max_image_pixels(), PIL.__version__, SCAN_VERSION]


def _read_rows(
    dataset: ImageDataset, max_rows: int, seconds: float, shard: tuple[int, int], poll: Callable[[], None]
) -> ScanReport:
    rank, processes = shard
    rows = evenly_spaced(len(dataset), max_rows)[rank::processes]
    report = ScanReport(len(rows) if len(dataset) <= max_rows else len(dataset) // processes)
    quick = dataset.dataset.select_columns(dataset.quick_columns)
    for chunk, values in chunks(quick, rows) if dataset.quick_columns else ():
        poll()
        for i, row in enumerate(chunk):
            for problem in dataset.quick_problems({name: column[i] for name, column in values.items()}):
                report.problems.append(Problem(row, dataset.where(row), problem.column, str(problem)))
    deadline = time.monotonic() + seconds
    for row, problems in checked_images(
        dataset, _rows_with_images(dataset, rows, shard), lambda: time.monotonic() > deadline
    ):
        poll()
        report.images_checked += 1
        for problem in problems:
            report.problems.append(Problem(row, dataset.where(row), problem.column, str(problem)))
    report.problems.sort(key=lambda problem: problem.row)
    return report


def _rows_with_images(dataset: ImageDataset, rows: Sequence[int], shard: tuple[int, int]) -> list[int]:
    """Return the rows whose images are checked, in an order that covers the dataset evenly.

    For remote data that do not fit into memory, each image is requested alone; in a Parquet file, its whole row group
    is received. Therefore images of some blocks are checked, one block after another.
    """
    generator, (rank, processes) = np.random.default_rng(0), shard
    if dataset.remote is None or dataset.row_blocks is None or dataset.remote.fits(len(dataset)):
        return generator.permutation(rows).tolist()
    blocks = rows_of_some_blocks(dataset.row_blocks)
    order = generator.permutation(len(blocks))[rank::processes]
    return [row for block in order for row in blocks[block]]


def require_clean(
    dataset: ImageDataset,
    *,
    shard: tuple[int, int] = (0, 1),
    tell: Callable[[str], Any] = print,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Scan the dataset before a run, and refuse bad rows or report how many will be skipped.

    Args:
        tell: receives each message.
        poll: called now and then; it may raise to stop.

    Raises:
        UserError: there are bad rows and `on_bad_sample` is "error"; the message names them.
    """
    report = scan(dataset, shard=shard, poll=poll)
    if report.problems and dataset.config.on_bad_sample == "error":
        shown = [f"  {problem}" for problem in report.problems[:_SHOWN]]
        if len(report.problems) > _SHOWN:
            shown.append(f"  and {len(report.problems) - _SHOWN} more ({CHECK} lists them all)")
        raise UserError(
            "\n".join(
                [
                    f"{len(report.problems)} of {report.rows:,} rows cannot be trained on:",
                    *shown,
                    "fix or remove them, or skip them with --on_bad_sample skip",
                ]
            )
        )
    if report.problems:
        tell(f"{len(report.problems)} of {report.rows:,} rows cannot be used; the next good rows are used instead.")
    if not report.complete:
        tell(
            f"Checked {report.images_checked:,} of {report.rows:,} images before training; {CHECK} checks all of them."
        )


def checked_images(
    dataset: ImageDataset, rows: Sequence[int], stop: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int, list[BadSample]]]:
    """Yield (row, problems of its images), decoding on all cores, until `stop()` returns True."""
    images = dataset.dataset.select_columns(dataset.image_columns)
    in_order = bool(len(rows)) and bool((np.diff(rows) == 1).all())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk, values in chunks(images, rows, IMAGE_CHUNK_ROWS):
            if dataset.remote is not None:
                whole_blocks = in_order or dataset.remote.fits(len(dataset))
                prefetch(itertools.chain.from_iterable(values.values()), whole_blocks=whole_blocks)
            records = [{name: column[i] for name, column in values.items()} for i in range(len(chunk))]
            yield from zip(chunk, pool.map(functools.partial(_image_problems, dataset), records), strict=True)
            if stop():
                return


def _image_problems(dataset: ImageDataset, row: dict[str, Any]) -> list[BadSample]:
    try:
        with decoding(row[dataset.config.image_column]):
            return dataset.image_problems(row)
    except BrokenImage as error:
        return [BadSample(dataset.config.image_column, str(error))]


def decoding(source: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which an image may be decoded: if it is large, while no other large one is.

    Raises:
        BrokenImage: the image cannot be opened.
    """
    width, height = open_image(source).size
    return _one_large_image() if width * height > LARGE_IMAGE_PIXELS else contextlib.nullcontext()


@contextlib.contextmanager
def _one_large_image() -> Iterator[None]:
    with _LARGE_IMAGE:
        yield
        # glibc keeps freed memory for the thread that had it, so that each thread would keep that of an image.
        with contextlib.suppress(OSError, AttributeError):  # another system, another C library
            ctypes.CDLL(None).malloc_trim(0)


def verify_reason(source: Any) -> tuple[tuple[int, int] | None, str | None]:
    """Return ((width, height), None) for an intact image, or (None, reason) for a broken one."""
    try:
        with decoding(source):
            return verify_image(source), None
    except BrokenImage as error:
        return None, str(error)


def chunks(
    dataset: Any, rows: Sequence[int], size: int = _CHUNK_ROWS
) -> Iterator[tuple[Sequence[int], dict[str, list]]]:
    """Yield (rows, their values by column) of a `datasets` table, `size` rows at a time."""
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        yield chunk, dataset[chunk]
