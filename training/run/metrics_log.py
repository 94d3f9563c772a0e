"""metrics.csv, and the running sums for its rows."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.core.files import replacing

TIMING_COLUMNS = ("elapsed_seconds", "images_per_second")
FIRST_COLUMNS = ("step", "epoch", "images_seen")


class MetricsLog:
    """metrics.csv with one row per logged step. A new metric adds a column.

    Rows after `resume_step`, the step that the run resumes from, are deleted.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = path
        self.columns: list[str] = [*FIRST_COLUMNS]
        if path.is_file():
            self._cut(resume_step)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row. If it has a new column, the file is rewritten (atomically), a few times per run."""
        new = [name for name in row if name not in self.columns]
        if new or not self.path.is_file():
            rows = read_metrics(self.path) if self.path.is_file() else []
            timing = [name for name in [*self.columns, *new] if name in TIMING_COLUMNS]
            self.columns = [name for name in [*self.columns, *new] if name not in TIMING_COLUMNS] + timing
            self._rewrite([*rows, _as_text(row)])
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(_as_text(row))

    def _cut(self, resume_step: int) -> None:
        kept = []
        for row in read_metrics(self.path):
            # An incomplete row, cut off by a crash, was written after the last checkpoint.
            if not (row.get("step") or "").isdigit() or int(row["step"]) > resume_step:
                break
            kept.append(row)
        self.columns = [*kept[0]] if kept else [*FIRST_COLUMNS]
        if kept:
            # Columns without values in the kept rows are dropped, so that the file equals an uninterrupted run's.
            used = {name for row in kept for name, value in row.items() if value not in ("", None)}
            self.columns = [name for name in self.columns if name in used]
            self._rewrite(kept)
        else:
            self.path.unlink()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:  # Excel saves CSV files with a byte order mark
        return list(csv.DictReader(file))


def _as_text(row: Mapping[str, float]) -> dict[str, str]:
    return {name: repr(value) if isinstance(value, float) else str(value) for name, value in row.items()}


class RunningMeans:
    """Means of values since the last reset. The state is a plain dict of numbers, which JSON saves exactly."""

    def __init__(self, state: Mapping[str, list[float]] | None = None):
        self._sums: dict[str, list[float]] = {name: list(pair) for name, pair in (state or {}).items()}

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
