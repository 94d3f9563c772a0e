"""Metrics over several random seeds: their mean and their standard deviation for each setting."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.experiments.comparison import Table, cell


@dataclass(frozen=True)
class Spread:
    """The values of one metric over the runs of one setting."""

    mean: float
    std: float | None
    """Sample standard deviation (of n − 1 degrees of freedom); None for a single run"""
    n: int


def seeds_table(table: Table, settings: Mapping[str, str]) -> Table:
    """Return a table with one row per setting, whose metrics are `Spread`s over its finished runs.

    A run that has failed or is not complete is left out, since its metrics are those of another step.

    Args:
        table: the table of all runs.
        settings: name of each run → name of its setting.
    """
    differing = [key for key in table.differing if key != "seed"]
    metrics = [key for key in table.columns if key not in ("name", "outcome", *table.differing)]
    rows: list[dict[str, Any]] = []
    for setting in dict.fromkeys(settings.values()):
        runs = [row for row in table.rows if settings.get(row["name"]) == setting]
        finished = [row for row in runs if str(row["outcome"]).startswith("finished")]
        row = {"name": setting, **{key: runs[0].get(key) for key in differing}, "n": len(finished)}
        for metric in metrics:
            values = [run[metric] for run in finished if isinstance(run.get(metric), (int, float))]
            if values:
                std = statistics.stdev(values) if len(values) > 1 else None
                row[metric] = Spread(statistics.fmean(values), std, len(values))
        rows.append(row)
    present = [metric for metric in metrics if any(metric in row for row in rows)]
    return Table(["name", *differing, "n", *present], rows, differing)


def seeds_csv(table: Table) -> str:
    """Return the table as CSV, with the columns METRIC_mean, METRIC_std and METRIC_n for each metric."""
    rows = []
    for row in table.rows:
        flat: dict[str, Any] = {}
        for key in table.columns:
            value = row.get(key)
            if isinstance(value, Spread):
                flat |= {f"{key}_mean": value.mean, f"{key}_std": value.std, f"{key}_n": value.n}
            else:
                flat[key] = value
        rows.append(flat)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    metrics = {key for row in table.rows for key, value in row.items() if isinstance(value, Spread)}
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [key for key in columns if key not in metrics], lineterminator="\n")
    writer.writeheader()
    writer.writerows([{key: value for key, value in row.items() if key not in metrics} for row in rows])
    return buffer.getvalue()


def seeds_markdown(table: Table) -> str:
    """Return the table as Markdown: "0.5321 ± 0.012" for several runs of one setting."""
    lines = [f"| {' | '.join(table.columns)} |", f"|{'---|' * len(table.columns)}"]
    for row in table.rows:
        cells = [
            _spread(row[key], row["n"]) if isinstance(row.get(key), Spread) else cell(row.get(key))
            for key in table.columns
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = "Mean ± sample standard deviation over the n finished runs of each setting, which differ in their seed."
    return "\n".join([note, "", *lines]) + "\n"


def _spread(spread: Spread, runs: int) -> str:
    mean = cell(int(spread.mean) if spread.mean.is_integer() else spread.mean)
    text = mean if not spread.std else f"{mean} ± {spread.std:.2g}"
    return text if spread.n == runs else f"{text} (n = {spread.n})"
