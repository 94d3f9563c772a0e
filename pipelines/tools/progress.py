"""Shows the progress of long work: one bar on a terminal, and otherwise a line from time to time.

tqdm keeps the bar at the bottom when a message is printed with `tqdm.write`, and limits how often it is drawn.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_REFRESHES = 0.2
USUAL_WIDTH = 80
MOST_BAR, LEAST_BAR = 30, 5  # characters
WIDE, BAR_SPACE = 60, 13  # on a terminal of this width, facts leave this space to the bar


class Progress:
    """Progress of work with a known number of parts, as a context manager.

        with Progress(len(images), "image", "latents") as progress:
            progress.update()

    Args:
        total: number of parts; None if it is unknown.
        unit: name of a part.
        title: short name of the work.
        done: number of parts that are done already.
        shown: whether anything is shown.
        facts: function that returns what is shown beside the bar, the most important first. What does not fit into the
            terminal is left out.
        say: function that prints a line, without a terminal.
    """

    on_screen = 0
    """Number of bars that are drawn; meanwhile, libraries draw none"""

    def __init__(
        self,
        total: int | None,
        unit: str,
        title: str,
        *,
        done: int = 0,
        shown: bool = True,
        facts: Callable[[], Sequence[str]] = tuple,
        say: Callable[[str], None] | None = None,
    ):
        self.total, self.unit, self.title, self.done = total, unit, title, done
        self._shown, self._facts, self._say = shown, facts, say or _print
        self._started, self._first = time.monotonic(), done
        self._last_line = self._started
        self._bar = _Bar(self) if shown and is_terminal() else None
        if self._bar is not None:
            Progress.on_screen += 1

    def update(self, parts: int = 1) -> None:
        """Count parts that are done, and show the progress if the time has come."""
        self.done += parts
        if self._bar is not None:
            self._bar.update(parts)
        elif self._shown and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self.postpone()
            self._say(self.sentence())

    def postpone(self) -> None:
        """Print the next line only after the usual time; for callers that have just printed a line of their own."""
        self._last_line = time.monotonic()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            Progress.on_screen -= 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def line(self, width: int, *, ascii_only: bool = False) -> str:
        """Return the bar and what is beside it, in at most `width` characters if possible."""
        if self.total is None:
            return _fitting(f"{self.title} {self.done:,}", self._all_facts(), width)
        share = self._share()
        head = f"{self.title} {self.done:,}/{self.total:,} {share:4.0%}"
        text = _fitting(head, self._all_facts(), width - (BAR_SPACE if width >= WIDE else 0))
        room = min(MOST_BAR, width - len(text) - 3)
        if room < LEAST_BAR:
            return text
        filled = round(share * room)
        bar = ("#" if ascii_only else "█") * filled + " " * (room - filled)
        return f"{head} |{bar}|{text.removeprefix(head)}"

    def sentence(self) -> str:
        """Return the progress as a line of a log: parts, percentage, time left and the other facts, and the clock."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,} ({self._share():.0%})"
        return ", ".join([f"{self.title} {count}", *self._all_facts(), f"at {time.strftime('%H:%M:%S')}"])

    def _share(self) -> float:
        return min(1.0, self.done / max(1, self.total or 1))

    def _all_facts(self) -> list[str]:
        made, elapsed = self.done - self._first, time.monotonic() - self._started
        if self.total is None or made <= 0:
            return list(self._facts())
        return [f"{clock((self.total - self.done) * elapsed / made)} left", *self._facts()]


def watched(items: Iterable[T], total: int | None, unit: str, title: str) -> Iterator[T]:
    """Yield the items while their progress is shown."""
    with Progress(total, unit, title) as progress:
        for item in items:
            yield item
            progress.update()


def is_terminal() -> bool:
    """Whether stderr is a terminal that can draw a line again."""
    with contextlib.suppress(AttributeError, ValueError):  # no stream, or a closed one
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return False


def clock(seconds: float) -> str:
    """Format seconds as a clock does: 75 → '1:15', 3700 → '1:01:40'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Bar(tqdm):
    """tqdm's bar with our text. It is drawn only when it is due, so that the facts are collected only then."""

    def __init__(self, progress: Progress):
        self._progress = progress
        super().__init__(
            total=progress.total,
            initial=progress.done,
            mininterval=SECONDS_BETWEEN_REFRESHES,
            delay=0,
            leave=False,
            disable=False,
            dynamic_ncols=True,
        )

    def __str__(self) -> str:
        now: Any = self.format_dict
        # A line of the full width would move the cursor to the next one.
        return self._progress.line((now["ncols"] or USUAL_WIDTH) - 1, ascii_only=bool(now["ascii"]))


def _fitting(head: str, facts: Iterable[str], width: int) -> str:
    text, separator = head, " "
    for fact in facts:
        longer = f"{text}{separator}{fact}"
        if len(longer) > width:
            break
        text, separator = longer, ", "
    return text


def _print(line: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it
        print(line, file=sys.stderr, flush=True)
