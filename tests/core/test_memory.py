"""The memory of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT, environment
from training.core.memory import peak_resident_bytes

HELD = 300_000_000
CHILD = "from training.core.memory import peak_resident_bytes; print(peak_resident_bytes())"


def test_the_peak_remains_when_memory_is_given_back():
    before = peak_resident_bytes()
    held = b"x" * (before + HELD)
    del held
    assert before + HELD < peak_resident_bytes() < 3 * before + HELD + 100_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_peak_of_a_process_leaves_out_the_one_that_started_it():
    """The system counts the memory of a process that starts another one as that of both."""
    held = b"x" * HELD
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, cwd=ROOT, env=environment(), check=True
    )
    assert len(held) == HELD
    assert 1_000_000 < int(done.stdout) < HELD


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_peak_of_another_process():
    assert peak_resident_bytes(os.getpid()) == peak_resident_bytes()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert peak_resident_bytes(ended.pid) is None
