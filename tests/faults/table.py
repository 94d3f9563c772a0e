"""The rows of docs/reliability.md, and the trials that produce them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

    from tests.faults.lab import Done, Lab


@dataclass
class Row:
    """A fault that was produced a number of times.

    Args:
        wrong: a line for each thing that was lost, and each message or exit status that was not as documented.
        steps_lost: the most that a run had to repeat; None if no run takes part.
    """

    fault: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    steps_lost: int | None = None
    statuses: Counter[int | None] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)

    def record(self, done: Done, problems: Sequence[str] = (), lost: int | None = None) -> Row:
        """Count a trial: how the disturbed command ended, and what was wrong."""
        self.tried += 1
        self.statuses[done.status] += 1
        if message := error_line(done.output):
            self.messages[message] += 1
        self.wrong += problems
        if lost is not None:
            self.steps_lost = max(lost, self.steps_lost or 0)
        return self


Rows = Iterator[Row]


@dataclass(frozen=True)
class Trial:
    """A function that yields rows.

    Args:
        mark: the mark of pytest for its short form: `slow` or `long`.
    """

    title: str
    rows: Callable[[Lab], Rows]
    mark: str


TRIALS: dict[str, Trial] = {}


def trial(title: str, mark: str = "slow") -> Callable[[Callable[[Lab], Rows]], Callable[[Lab], Rows]]:
    """Register a function of a Lab that yields rows, under its own name."""

    def register(function: Callable[[Lab], Rows]) -> Callable[[Lab], Rows]:
        TRIALS[function.__name__] = Trial(title, function, mark)
        return function

    return register


def trials_of(module: ModuleType) -> list[ParameterSet]:
    """Return the names of the trials of a module as parameters of a test, with their marks."""
    return [
        pytest.param(name, marks=getattr(pytest.mark, trial.mark))
        for name, trial in TRIALS.items()
        if trial.rows.__module__ == module.__name__
    ]


def wrong_in(name: str, lab: Lab) -> list[str]:
    """Run a trial and return what was wrong; a row in which nothing was tried is wrong, too."""
    rows = list(TRIALS[name].rows(lab))
    untried = [f"{row.fault}: nothing was tried" for row in rows if not row.tried]
    return [line for row in rows for line in row.wrong] + untried if rows else ["the trial has no rows"]


def expect(
    done: Done, statuses: Sequence[int], says: Sequence[str] = (), never: Sequence[str] = ("Traceback",)
) -> list[str]:
    """Return what is not as expected: the exit status, words that are missing, and words that must not be there."""
    tail = done.output.strip().splitlines()[-3:]
    problems = [] if done.status in statuses else [f"exit status {done.status} instead of {statuses}: {tail}"]
    problems += [f"the output does not contain '{text}': {tail}" for text in says if text not in done.output]
    return problems + [
        f"the output contains '{text}': {error_line(done.output)}" for text in never if text in done.output
    ]


def error_line(output: str) -> str:
    """Return the last line of a message: one that starts with `error:`, `warning:` or the name of an exception.

    The exception with which a launcher reports that a process failed says nothing, and is left out; so does the warning
    that a run of a few steps is short, with which every run of these trials begins.
    """
    pattern = r"(error|warning): |(?!torch\.distributed\.elastic)[A-Za-z.]*(Error|Interrupt|Exception)\b"
    lines = [
        line for line in output.splitlines() if re.match(pattern, line) and "rarely give a useful model" not in line
    ]
    return lines[-1].strip() if lines else ""
