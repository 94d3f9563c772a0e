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
PRINT = "from training.core.memory import peak_resident_bytes as peak; print(peak())"
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def printed(code: str) -> list[int]:
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(), check=True)
    return [int(line) for line in done.stdout.split()]


def test_the_peak_remains_when_memory_is_given_back():
    before, after = printed(f"{PRINT}; held = b'x' * {HELD}; del held; print(peak())")
    assert HELD - 20_000_000 < after - before < HELD + 20_000_000


@needs_proc
def test_the_peak_of_a_process_leaves_out_the_one_that_started_it():
    """The system counts the memory of a process that starts another one as that of both."""
    held = b"x" * HELD
    (peak,) = printed(PRINT)
    assert 1_000_000 < peak < len(held)


@needs_proc
def test_the_peak_of_another_process():
    assert peak_resident_bytes(os.getpid()) == peak_resident_bytes()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert peak_resident_bytes(ended.pid) is None
