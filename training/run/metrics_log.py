"""metrics.csv, and the running sums for its rows."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.core.files import fsync_file, write_atomically

logger = logging.getLogger("halftone")

TIMING_COLUMNS = ("elapsed_seconds", "images_per_second")
FIRST_COLUMNS = ("step", "epoch", "images_seen")


class MetricsLog:
    """metrics.csv with one row per logged step. A new metric adds a column.

    Rows after `resume_step`, the step that the run resumes from, are deleted, and so are damaged rows. Rows that cannot
    be written, because the disk is full for example, are kept and written later.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = path
        self.columns: list[str] = [*FIRST_COLUMNS]
        self._waiting: list[dict[str, str]] = []
        self._failed = False
        if path.is_file():
            self._cut(resume_step)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row. If it has a new column, the file is rewritten (atomically), a few times per run.

        Raises:
            OSError: the row could not be written; the next call tries again.
        """
        self._waiting.append(_as_text(row))
        self._write_waiting()

    def settle(self) -> None:
        """Flush all rows to the disk, so that a checkpoint is never newer than its rows. Raises OSError as `write`."""
        if self._waiting:
            self._write_waiting()
        if self.path.is_file():
            fsync_file(self.path)

    def _write_waiting(self) -> None:
        new = [
            name for name in dict.fromkeys(name for row in self._waiting for name in row) if name not in self.columns
        ]
        rewrite = bool(new) or self._failed or not self.path.is_file()
        self._failed = True  # until all rows are written: a part of them may be in the file
        if rewrite:
            timing = [name for name in [*self.columns, *new] if name in TIMING_COLUMNS]
            self.columns = [name for name in [*self.columns, *new] if name not in TIMING_COLUMNS] + timing
            steps = {row.get("step") for row in self._waiting}
            rows = read_metrics(self.path) if self.path.is_file() else []
            self._rewrite([*(row for row in rows if row["step"] not in steps), *self._waiting])
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerows(self._waiting)
        self._waiting.clear()
        self._failed = False

    def _cut(self, resume_step: int) -> None:
        old = self.path.read_bytes()
        rows = read_metrics(self.path)
        kept = [row for row in rows if int(row["step"]) <= resume_step]
        if not kept:
            if resume_step and not rows and old:
                aside = self.path.with_name(f"{self.path.stem}.damaged{self.path.suffix}")
                os.replace(self.path, aside)
                logger.warning("%s has no complete row; it was renamed to %s", self.path, aside.name)
            else:
                self.path.unlink()
            return
        # Columns without values in the kept rows are dropped, so that the file equals an uninterrupted run's.
        used = {name for row in kept for name, value in row.items() if value != ""}
        self.columns = [name for name in kept[0] if name in used]
        if _csv(self.columns, kept).encode("utf-8") != old:
            self._rewrite(kept)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        write_atomically(self.path, _csv(self.columns, rows))


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv. Rows that are not complete, or have other values than numbers, are left out.

    A killed process or a power cut may leave them: rows that end in the middle, or zero bytes.
    """
    text = path.read_bytes().decode("utf-8-sig", errors="replace")  # Excel saves CSV files with a byte order mark
    rows: list[dict[str, str]] = []
    with contextlib.suppress(csv.Error):  # a field that is too long: the rest of the file is damaged
        for row in csv.DictReader(io.StringIO(text.replace("\0", ""), newline="")):
            if _is_complete(row):
                rows.append(row)
    return rows


def _is_complete(row: Mapping[Any, Any]) -> bool:
    if not (row.get("step") or "").isdecimal() or None in row or None in row.values():
        return False
    try:
        [float(value) for value in row.values() if value != ""]
    except ValueError:
        return False
    return True


def _csv(columns: list[str], rows: list[dict[str, str]]) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _as_text(row: Mapping[str, float]) -> dict[str, str]:
    return {name: repr(value) if isinstance(value, float) else str(value) for name, value in row.items()}


class RunningMeans:
    """Means of values since the last reset. The state is a plain dict of numbers, which JSON saves exactly."""

    def __init__(self, state: Mapping[str, list[float]] | None = None):
        self._sums: dict[str, list[float]] = {name: [total, count] for name, (total, count) in (state or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            pair = self._sums.setdefault(name, [0.0, 0])
            pair[0] += value
            pair[1] += 1

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._sums.items()}

    def reset(self) -> None:
        self._sums.clear()

    def state(self) -> dict[str, Any]:
        return {name: list(pair) for name, pair in self._sums.items()}


class EpochLoss:
    """Mean, minimum and maximum of the finite step losses of an epoch."""

    def __init__(self, state: Mapping[str, float] | None = None):
        self.total, self.count, self.low, self.high = (
            (state["total"], int(state["count"]), state["low"], state["high"])
            if state
            else (0.0, 0, math.inf, -math.inf)
        )

    def add(self, loss: float) -> None:
        self.total += loss
        self.count += 1
        self.low = min(self.low, loss)
        self.high = max(self.high, loss)

    def summary(self) -> dict[str, float]:
        if not self.count:
            return {}
        return {
            "epoch_loss_mean": self.total / self.count,
            "epoch_loss_min": self.low,
            "epoch_loss_max": self.high,
        }

    def state(self) -> dict[str, float]:
        return {"total": self.total, "count": self.count, "low": self.low, "high": self.high}
