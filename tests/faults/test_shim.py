"""The tools of these tests: what counts as a change, and that faults happen where they are planned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.compare import differences
from tests.faults.shim import BROKEN_ONCE, FULL_ONCE, KILL, TWO_CTRL_C, Fault, Plan

PROGRAM = """
import os, shutil
import numpy
from safetensors.numpy import save_file
os.mkdir("a")                                     # 1
with open("a/text", "w") as file:                 # 2
    file.write("x")                               # 3, when it is flushed
    file.flush()
    os.fsync(file.fileno())                       # 4
os.replace("a/text", "a/name")                    # 5
os.symlink("name", "a/link")                      # 6
os.link("a/name", "a/hard")                       # 7
os.truncate("a/hard", 0)                          # 8
save_file({"x": numpy.ones(1)}, "a/tensors")      # written by Rust
shutil.rmtree("a")
print("the end")
"""


@pytest.fixture
def plan(tmp_path) -> Plan:
    (tmp_path / "work").mkdir()
    return Plan(tmp_path / "plan")


def run(plan: Plan, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **plan.environment()}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=plan.file.parent / "work", env=environment, capture_output=True, text=True
    )


def test_changes_of_python_and_of_libraries_count(plan, tmp_path):
    plan.watch(tmp_path / "work")
    assert run(plan).returncode == 0
    names = [change.operation for change in plan.changes()]
    assert names[:8] == ["mkdir", "open", "write", "fsync", "rename", "symlink", "link", "truncate"]
    assert [change.number for change in plan.changes()] == list(range(1, len(names) + 1))
    assert names[8] == "open"
    assert names.count("unlink") == 4
    assert names[-1] == "rmdir"


def test_other_folders_do_not_count(plan, tmp_path):
    (tmp_path / "other").mkdir()
    plan.watch(tmp_path / "other")
    assert run(plan).returncode == 0
    assert plan.changes() == []


@pytest.mark.parametrize(("number", "left"), [(1, []), (2, ["a"]), (3, ["a", "a/text"]), (6, ["a", "a/name"])])
def test_a_process_is_killed_before_a_change(plan, tmp_path, number, left):
    work = tmp_path / "work"
    plan.arm(work, number, KILL)
    assert run(plan).returncode == -9
    assert sorted(str(path.relative_to(work)) for path in work.rglob("*")) == left


@pytest.mark.parametrize(
    ("fault", "text"), [(FULL_ONCE, "No space left on device"), (BROKEN_ONCE, "Input/output error")]
)
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_a_call_fails(plan, tmp_path, fault, text, number):
    plan.arm(tmp_path / "work", number, fault)
    done = run(plan)
    assert done.returncode == 1
    assert text in done.stderr
    assert plan.faults() == 1


def test_two_signals_are_two(plan, tmp_path):
    plan.arm(tmp_path / "work", 1, TWO_CTRL_C)
    count = "import signal; signal.signal(signal.SIGINT, lambda *_: print('asked'))\n"
    assert run(plan, count + PROGRAM).stdout == "asked\nasked\nthe end\n"


def test_a_slow_disk_is_slow(plan, tmp_path):
    plan.arm(tmp_path / "work", 1, Fault("slow", milliseconds=300))
    clock = "import os, time; t = time.monotonic(); os.mkdir('a'); print(time.monotonic() - t)"
    assert float(run(plan, clock).stdout) > 0.3


def make(folder: Path) -> Path:
    (folder / "checkpoints/step-00000002").mkdir(parents=True)
    (folder / "checkpoints/step-00000002/trainer_state.json").write_text('{"step": 2, "elapsed_seconds": 1.0}')
    (folder / "checkpoints/latest").symlink_to("step-00000002")
    (folder / "metrics.csv").write_text("step,loss,elapsed_seconds\n1,0.5,0.1\n2,0.25,0.2\n")
    return folder


def test_a_comparison_ignores_measured_times_only(tmp_path):
    one, other = make(tmp_path / "one"), make(tmp_path / "other")
    (other / "metrics.csv").write_text("step,loss,elapsed_seconds\n1,0.5,0.3\n2,0.25,0.9\n")
    (other / "checkpoints/step-00000002/trainer_state.json").write_text('{"step": 2, "elapsed_seconds": 3.0}')
    assert differences(one, other) == []
    (other / "metrics.csv").write_text("step,loss,elapsed_seconds\n1,0.5,0.3\n2,0.26,0.9\n")
    (other / "checkpoints/latest").unlink()
    (other / ".writing-1-x").touch()
    assert differences(other, one) == [
        "checkpoints/latest is missing", ".writing-1-x is left over", "metrics.csv is different",
    ]  # fmt: skip
