"""What only informs never ends a run: a failure is one warning, until it works again."""

from __future__ import annotations

import logging

import pytest

from training.core.informing import Informing
from training.run.output import start_logging

FULL = OSError(28, "No space left on device")
FAILED = "WARNING curves.png could not be written"


def test_a_failure_is_said_once_until_it_works_again(tmp_path):
    start_logging(tmp_path / "run.log")
    informing = Informing()
    for error in (FULL, FULL, None, None, ValueError("no such colour")):
        with informing("curves.png", "they are drawn later"):
            if error is not None:
                raise error
    messages = [line.split(" ", 2)[2] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert messages == [
        f"{FAILED} (No space left on device); training continues; they are drawn later",
        "INFO curves.png can be written again",
        f"{FAILED} (ValueError: no such colour); training continues; they are drawn later",
    ]


def test_a_request_to_stop_passes_through():
    with pytest.raises(KeyboardInterrupt), Informing()("curves.png"):
        raise KeyboardInterrupt


def test_lines_of_the_log_wait_for_their_folder(tmp_path, capsys):
    start_logging(tmp_path / "run" / "run.log")
    logger = logging.getLogger("halftone")
    logger.info("first")
    logger.info("second")
    (tmp_path / "run").mkdir()
    logger.info("third")
    lines = [line.split(" ", 3)[3] for line in (tmp_path / "run/run.log").read_text().splitlines()]
    assert [line for line in lines if "run.log" not in line] == ["first", "second", "third"]
    assert capsys.readouterr().out.count("run.log could not be written") == 1
