"""Produce every fault in its long form, and write docs/reliability.md.

    python -m tests.faults [--jobs N] [--every N] [--list] [NAME ...]

Without names, everything is tried, which takes hours. With names, only the sections of these trials are replaced. A
section is written after each of its rows. The exit status is 1 if anything was lost, or a message or an exit status was
not as documented.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipelines.tools.cli import Options, UserError, entry_point
from tests.faults import kinds, trials_data, trials_hub, trials_runs  # noqa: F401 - they register their trials
from tests.faults.lab import Lab, available_workers
from tests.faults.table import TRIALS, Row, Trial
from tests.support.runs import ROOT

PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# Reliability

`make test-faults` produced each of these faults in real processes on a machine with Linux, and wrote this page. After
each fault, the same command was run again, and its weights, `metrics.csv` (without the measured times), samples,
exported pipeline and the names of all files were compared with those of a run without any fault, bit for bit.

The column *wrong* counts the trials in which something differed or was left over, or in which the message or the exit
status was not as [documented](runs.md). *Steps lost* is the largest number of training steps that a run repeated after
the fault; with SIGKILL and a power cut, it is limited by the time between two checkpoints. A negative exit status is
the signal that ended the process. [CONTRIBUTING.md](../CONTRIBUTING.md) describes how the faults are produced.
"""
MOST_CHARACTERS = 160


def section(trial: Trial, rows: list[Row], minutes: float) -> str:
    lines = [f"## {trial.title}\n", "| fault | tried | wrong | steps lost | exit status | message |"]
    lines.append("|---|---:|---:|---:|---|---|")
    for row in rows:
        lost = "" if row.steps_lost is None else row.steps_lost
        statuses = ", ".join(f"{'hung' if s is None else s} ({n})" for s, n in row.statuses.most_common())
        lines.append(f"| {row.fault} | {row.tried:,} | {len(row.wrong)} | {lost} | {statuses} | {_message(row)} |")
    return "\n".join([*lines, f"\n{minutes:.0f} minutes." if minutes >= 1 else ""]).rstrip() + "\n"


def _message(row: Row) -> str:
    if not row.messages:
        return ""
    text = row.messages.most_common(1)[0][0]
    text = re.sub(r"(/[\w.-]+)*/(worker\d+)/\d+", "…", text)  # the working folder of this command
    short = text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
    return "`" + short.replace("|", "\\|").replace("`", "'") + "`"


def read_sections(page: Path) -> dict[str, str]:
    """Return the sections of an existing page by their titles."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    return {part.split("\n", 1)[0].strip(): f"## {part.rstrip()}\n" for part in text.split("\n## ")[1:]}


def write_page(page: Path, sections: dict[str, str]) -> None:
    ordered = [sections[trial.title] for trial in TRIALS.values() if trial.title in sections]
    page.write_text("\n".join([HEAD, *ordered]), encoding="utf-8")


def main() -> int:
    parser = Options(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="trials; without names, all of them")
    parser.add_argument("--jobs", type=int, default=available_workers(), help="number of commands at a time")
    parser.add_argument("--every", type=int, default=1, help="hit one change of the file system in N instead of all")
    parser.add_argument("--list", action="store_true", help="list the names of the trials")
    options = parser.parse(sys.argv[1:])
    if options.list:
        print("\n".join(f"{name}: {trial.title}" for name, trial in TRIALS.items()))
        return 0
    if unknown := [name for name in options.names if name not in TRIALS]:
        raise UserError(f"unknown trial {unknown[0]}; --list lists them")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wrong = 0
    for name in options.names or TRIALS:
        with tempfile.TemporaryDirectory(prefix="halftone-faults-") as work:
            wrong += _run(name, Path(work), options.jobs, options.every)
    return 1 if wrong else 0


def _run(name: str, work: Path, jobs: int, every: int) -> int:
    """Run a trial, write its section after each row, and return the number of things that were wrong."""
    rows, began = [], time.monotonic()
    try:
        with Lab(work, thorough=True, every=every, workers=jobs) as lab:
            for row in TRIALS[name].rows(lab):
                rows.append(row)
                print(f"{row.fault}: {row.tried} times, {len(row.wrong)} wrong", flush=True)
                print("".join(f"    {line}\n" for line in row.wrong), end="", flush=True)
                text = section(TRIALS[name], rows, (time.monotonic() - began) / 60)
                write_page(PAGE, read_sections(PAGE) | {TRIALS[name].title: text})
    except pytest.skip.Exception as skipped:
        print(f"{name} was skipped: {skipped}")
        return 0
    return sum(len(row.wrong) for row in rows)


if __name__ == "__main__":
    entry_point(main)
