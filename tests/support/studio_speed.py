"""Measure how long the studio takes until its page is open and until it shows the first image, and its memory.

    python -m tests.support.studio_speed --model runs/my_images/latent_diffusion_64_caption

It starts `pipelines/demo.py` with these models, opens the page in a real browser (Debian: chromium), and generates
twice in the first tab of the first model, with the settings that the page has. It prints a table of wall-clock seconds,
processor seconds of the studio (without the browser) and resident memory.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil
from playwright.sync_api import TimeoutError, expect

from pipelines.tools.cli import Options, UserError, entry_point
from tests.support.browser import SECONDS, Visitor, chromium, opened

MB = 1_000_000


class Stopwatch:
    """Rows of a table: what has happened, and what it has taken since the start of a part."""

    def __init__(self) -> None:
        self.born = self.started = time.monotonic()
        self.process: psutil.Process | None = None
        self.cpu_before = 0.0
        self.rows: list[str] = []

    def follow(self, pid: int) -> None:
        """Measure this process, which was started by the stopwatch's own process."""
        self.process = psutil.Process(pid)

    def restart(self) -> None:
        """Begin a part: seconds count from here."""
        self.started, self.cpu_before = time.monotonic(), self._cpu()

    def note(self, what: str) -> None:
        """Add a row with what the part has taken so far."""
        self._add(what, time.monotonic() - self.started, self._cpu() - self.cpu_before)

    def note_all(self, what: str) -> None:
        """Add a row with what all parts together have taken so far."""
        self._add(what, time.monotonic() - self.born, self._cpu())

    def _add(self, what: str, wall: float, cpu: float) -> None:
        assert self.process is not None
        self.rows.append(f"| {what} | {wall:.1f} | {cpu:.1f} | {self.process.memory_info().rss / MB:,.0f} |")

    def _cpu(self) -> float:
        if self.process is None:
            return 0.0
        times = self.process.cpu_times()
        return times.user + times.system


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    flags = ["--model", *(str(Path(model).expanduser().resolve()) for model in options.model)]
    flags += ["--runs", str(Path(options.runs).expanduser().resolve())] if options.runs else []
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        watch = Stopwatch()
        with opened(*flags, cwd=Path(folder), OMP_NUM_THREADS=str(options.threads)) as studio:
            watch.follow(studio.process.pid)
            with urllib.request.urlopen(studio.address) as answer:
                answer.read()
            watch.note("from the command until the page answers")
            watch.restart()
            visitor = Visitor(browser, studio.address, scale=1)
            title = first_tab(visitor)
            watch.note("from opening the page until it can be used")
            for which in ("first", "second"):
                generate(visitor, title, watch, which)
            visitor.close()
    print("| | seconds | processor seconds | memory, MB |\n|---|---:|---:|---:|")
    print("\n".join(watch.rows))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    parser = Options(__doc__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="Pipeline folders, runs or checkpoints; the first one generates")
    add("--runs", help="Folder of training runs, for the tab of training runs")
    add("--threads", type=int, default=cores, help="Threads of PyTorch (default: one for each core)")
    return parser.parse(argv)


def first_tab(visitor: Visitor) -> str:
    """Return the title of the tab that the page opens with. Raises UserError if it does not generate step by step."""
    try:
        visitor.page.get_by_role("button", name="Generate", exact=True).first.wait_for()
    except TimeoutError:
        raise UserError("the first model does not generate images step by step; name another one first") from None
    return visitor.page.locator("[role=tab][aria-selected=true]:visible").last.inner_text()


def generate(visitor: Visitor, title: str, watch: Stopwatch, which: str) -> None:
    """Generate with the settings of the page, and note when the first unfinished and the finished images appear."""
    line = visitor.page.locator(".status:visible").last
    before = line.inner_text()
    watch.restart()
    visitor.press("Generate")
    if before:  # the images of the last time are still there
        expect(line).not_to_have_text(before, timeout=1000 * SECONDS)
    status = visitor.wait_for_status(r"Step \d+ of|images in")
    visitor.group(f"{title}: images").locator("img").first.wait_for()
    if status.startswith("Step"):
        watch.note(f"from *Generate* until the {which} unfinished images")
    if not before:
        watch.note_all("in all, from the command until the first image is seen")
    status = visitor.wait_for_status("images in")
    watch.note(f"from *Generate* until the {which} {status.split(' in ')[0]} are finished")
    visitor.press("Another seed")


if __name__ == "__main__":
    entry_point(main)
