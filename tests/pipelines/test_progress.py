"""The bar of long work on terminals of any kind, the lines without one, and what libraries print."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from pipelines.tools.progress import Progress, clock, watched
from tests.conftest import ROOT
from tests.support.runs import TOY
from tests.support.terminal import on_terminal, screen
from tests.support.toy_runs import COMMON

FACTS = ["loss 0.1234", "val_loss 0.2345", "145 images/s", "epoch 3/10", "val_psnr 19.2", "val_ssim 0.68"]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    return {**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm", **changes}


def program(text: str) -> list[str]:
    """Return the command of a program with a `main`, started as all commands are."""
    return [sys.executable, "-c", f"{text}\nfrom pipelines.tools.cli import entry_point\nentry_point(main)"]


@pytest.mark.parametrize("width", [*range(30, 130, 7), 250])
def test_the_line_fits_into_the_terminal_and_its_first_facts_are_the_last_to_go(width):
    progress = Progress(5000, "step", "step", done=1250, shown=False, facts=lambda: FACTS)
    line = progress.line(width)
    assert len(line) <= width
    assert line.startswith("step 1,250/5,000  25%")
    there = [fact in line for fact in FACTS]
    assert there == sorted(there, reverse=True), "a fact is left out only if those after it are, too"
    assert "|" in line or width < 60
    assert progress.line(120, ascii_only=True).isascii()


def test_the_time_left_is_that_of_the_parts_done_here():
    progress = Progress(100, "part", "work", done=50, shown=False)
    assert "left" not in progress.line(80)
    progress._started -= 10
    progress.update(10)
    assert progress.line(80).endswith("| 0:40 left")
    assert re.fullmatch(r"work 60 of 100 \(60%\), 0:40 left, at \d\d:\d\d:\d\d", progress.sentence())


def test_an_unknown_number_of_parts():
    assert Progress(None, "caption", "captions", done=1200, shown=False).line(80) == "captions 1,200"
    assert list(watched(iter("ab"), None, "letter", "letters")) == ["a", "b"]


def test_the_clock():
    assert [clock(75), clock(3700), clock(0.4)] == ["1:15", "1:01:40", "0:00"]


# --- a training


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 100])
def test_the_bar_of_a_training_is_one_line_that_messages_do_not_tear(tmp_path, columns):
    command = [sys.executable, TOY, "--output_dir", tmp_path / "run", *COMMON, "--num_train_epochs", "3"]
    status, written = on_terminal(list(map(str, command)), columns=columns, env=environment(), cwd=tmp_path)
    assert status == 0, written
    bars = re.findall(r"\r(step \d+/18[^\r\n]*)", written)
    assert len(bars) >= 3
    assert max(map(len, bars)) < columns
    assert any("left, loss" in bar for bar in bars)
    shown = screen(written)
    log = (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    logged = re.sub(r"^\S+ \S+ WARNING ", "warning: ", re.sub(r"^\S+ \S+ INFO ", "", log, flags=re.M), flags=re.M)
    for line in logged.splitlines():
        assert line.rstrip() in shown, "each message is on a line of its own, without parts of the bar"
    assert not [line for line in shown if line.startswith("step ") and "%" in line], "the bar is removed at the end"
    assert "\x1b" not in written


@pytest.mark.slow
def test_a_terminal_that_cannot_redraw_a_line_gets_no_bar(tmp_path):
    command = [sys.executable, TOY, "--output_dir", tmp_path / "run", *COMMON, "--num_train_epochs", "1"]
    status, written = on_terminal(list(map(str, command)), env=environment(TERM="dumb", NO_COLOR="1"), cwd=tmp_path)
    assert status == 0, written
    assert "\r" not in written.replace("\r\n", "")
    assert "epoch 1, step 6: loss mean" in written


# --- libraries

QUICK_BAR = "import tqdm.auto\ndef main():\n    list(tqdm.auto.tqdm(range(3), desc='theirs'))\n    print('done')"
SLOW_BAR = """
import time, tqdm.auto
def main():
    for _ in tqdm.auto.tqdm(range(30), desc='theirs'):
        time.sleep(0.1)
    print('done')
"""
BOTH_BARS = """
import time, tqdm.auto
from pipelines.tools.progress import watched
def main():
    for number in watched(range(3), 3, 'part', 'ours'):
        for _ in tqdm.auto.tqdm(range(5), desc='theirs', delay=0):
            time.sleep(0.2)
    print('done')
"""


def test_a_library_draws_no_bar_for_quick_work_nor_beside_ours():
    for text in (QUICK_BAR, BOTH_BARS):
        status, written = on_terminal(program(text), env=environment())
        assert status == 0, written
        assert "theirs" not in written
        assert screen(written)[-2].endswith("done")
    assert "ours 2/3" in written


@pytest.mark.slow
def test_the_bar_of_a_library_for_long_work_is_removed_at_the_end():
    status, written = on_terminal(program(SLOW_BAR), env=environment())
    assert status == 0, written
    assert "theirs" in written
    assert "theirs" not in "".join(screen(written))


@pytest.mark.parametrize("text", [QUICK_BAR, SLOW_BAR, BOTH_BARS])
def test_without_a_terminal_there_are_no_bars(text):
    done = subprocess.run(program(text), capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


WARNINGS = """
import warnings, logging, pipelines.common.words
def main():
    warnings.warn("a token of hf_abcdefghijklmnopqrstuvwxyz0123456789\\nand \\x1b[31mmore")
    warnings.warn("old", FutureWarning)
    logging.getLogger("pipelines.common.words").warning("a word")
"""


def test_warnings_are_one_line_and_deprecations_are_hidden():
    done = subprocess.run(program(WARNINGS), capture_output=True, text=True, env=environment())
    first, second = done.stderr.splitlines()
    assert first == r"warning: a token of *** and \x1b[31mmore"
    assert second == "warning: a word"
    asked = subprocess.run(program(WARNINGS), capture_output=True, text=True, env=environment(PYTHONWARNINGS="default"))
    assert "FutureWarning: old" in asked.stderr
