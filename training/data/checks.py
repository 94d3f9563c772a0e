"""Checks of the rows before training: broken images, empty captions and invalid labels, in one pass.

N rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.tools.cli import UserError
from pipelines.tools.commands import command
from training.data.fingerprints import evenly_spaced
from training.data.images import BadSample, ImageDataset
from training.data.transforms import BrokenImage, verify_image

CHECK = command("data_scripts/check_dataset.py")
# Before training, every row of a dataset of up to SCAN_ROWS rows is checked, as far as SCAN_SECONDS allow.
SCAN_ROWS = 20_000
SCAN_SECONDS = 10.0
_SHOWN = 10
_CHUNK_ROWS = 256


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
) -> ScanReport:
    """Check captions, labels and images of all rows, or of `max_rows` evenly spaced rows if there are more.

    Args:
        seconds: time limit for decoding images; they are decoded in an order that covers the dataset evenly.
        shard: (rank, number of processes); each process checks its share of the rows.
    """
    rank, processes = shard
    rows = evenly_spaced(len(dataset), max_rows)[rank::processes]
    report = ScanReport(len(rows) if len(dataset) <= max_rows else len(dataset) // processes)
    quick = dataset.dataset.select_columns(dataset.quick_columns)
    for chunk, values in chunks(quick, rows) if dataset.quick_columns else ():
        for i, row in enumerate(chunk):
            for problem in dataset.quick_problems({name: column[i] for name, column in values.items()}):
                report.problems.append(Problem(row, dataset.where(row), problem.column, str(problem)))
    deadline = time.monotonic() + seconds
    shuffled = np.random.default_rng(0).permutation(rows).tolist()
    for row, problems in checked_images(dataset, shuffled, lambda: time.monotonic() > deadline):
        report.images_checked += 1
        for problem in problems:
            report.problems.append(Problem(row, dataset.where(row), problem.column, str(problem)))
    report.problems.sort(key=lambda problem: problem.row)
    return report


def require_clean(
    dataset: ImageDataset, *, shard: tuple[int, int] = (0, 1), tell: Callable[[str], Any] = print
) -> None:
    """Scan the dataset before a run, and refuse bad rows or report how many will be skipped.

    Args:
        tell: receives each message.

    Raises:
        UserError: there are bad rows and `on_bad_sample` is "error"; the message names them.
    """
    report = scan(dataset, shard=shard)
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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk, values in chunks(images, rows):
            records = [{name: column[i] for name, column in values.items()} for i in range(len(chunk))]
            yield from zip(chunk, pool.map(dataset.image_problems, records), strict=True)
            if stop():
                return


def verify_reason(source: Any) -> tuple[tuple[int, int] | None, str | None]:
    """Return ((width, height), None) for an intact image, or (None, reason) for a broken one."""
    try:
        return verify_image(source), None
    except BrokenImage as error:
        return None, str(error)


def chunks(dataset: Any, rows: Sequence[int]) -> Iterator[tuple[Sequence[int], dict[str, list]]]:
    """Yield (rows, their values by column) of a `datasets` table, a few hundred rows at a time."""
    for start in range(0, len(rows), _CHUNK_ROWS):
        chunk = rows[start : start + _CHUNK_ROWS]
        yield chunk, dataset[chunk]
