"""After a SIGKILL at any moment, especially while a checkpoint is written, the run resumes from an undamaged one."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.engine.test_topology import start
from tests.support.child import Child, wait_until
from tests.support.runs import assert_same_state
from tests.support.toy import main as toy_main
from training.run import checkpoint
from training.run.recovery import clear_leftovers

pytestmark = pytest.mark.slow

KILLS = 20
# With a checkpoint at every step, most of the time is spent on writing, linking and deleting checkpoints.
FLAGS = (
    "--train_batch_size", "4", "--critic", "true", "--num_train_epochs", "9", "--checkpointing_steps", "1",
    "--checkpoints_total_limit", "2", "--validation_steps", "7", "--preview_epochs", "0", "--logging_steps", "3",
)  # fmt: skip


def words(folder: Path) -> list[str]:
    return ["--output_dir", str(folder), "--report_to", "none", "--cpu_threads", "1", *FLAGS]


def kill_after(folder: Path, seconds: float) -> bool:
    """Start the run and kill it `seconds` after its first new checkpoint; return False if it ended before that."""
    latest = folder / "checkpoints/latest"
    before = latest.resolve().name
    child = Child(lambda: toy_main(words(folder)), folder.with_name("output.txt"))
    wait_until(lambda: latest.resolve().name != before or child.has_ended())
    time.sleep(seconds)
    alive = not child.has_ended()
    if alive:
        child.kill()
    return alive


def test_killed_at_twenty_moments(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start(whole, *FLAGS, processes=1)
    moments = random.Random(0)
    steps, in_writing, kills = [], 0, 0
    while kills < KILLS:
        if not kill_after(killed, moments.uniform(0.0, 0.2)):
            break
        kills += 1
        leftovers = [p.name for p in (killed / "checkpoints").glob(".*")]
        in_writing += bool(leftovers)
        clear_leftovers(killed / "checkpoints")  # as the next session does
        latest = checkpoint.find_checkpoint(killed / "checkpoints", "latest")
        if latest is not None:
            checkpoint.verify(latest)
            checkpoint.verify(killed / "checkpoints" / "latest")
            steps.append(int(latest.name.removeprefix("step-")))
    assert kills == KILLS, f"the run is too short for {KILLS} kills"
    assert steps == sorted(steps), "a session resumed from an older checkpoint than the session before it"
    print(f"checkpoints after each kill: {steps}; {in_writing} kills while one was written, linked or deleted")
    assert in_writing >= 3
    assert steps[-1] > 5
    start(killed, *FLAGS, processes=1)
    assert_same_state(killed, whole)
    assert (killed / "checkpoints/best").resolve().name == (whole / "checkpoints/best").resolve().name
    assert [p.name for p in (killed / "checkpoints").glob(".*")] == []
