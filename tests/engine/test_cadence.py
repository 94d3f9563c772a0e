"""The steps after which a run validates, shows previews and saves; its metrics do not depend on its speed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.child import Child, wait_until
from tests.support.runs import assert_same_state, rows, toy
from tests.support.toy import ToyConfig
from tests.support.toy_runs import run
from training.engine.cadence import (
    LONG_EPOCH_STEPS,
    MOST_EVENTS,
    Cadence,
    CadenceConfig,
    CheckpointClock,
    Period,
    automatic_period,
)

# 3 steps per epoch, 120 steps: the program chooses a validation after every second epoch.
LONG = ("--num_samples", "24", "--num_train_epochs", "40", "--logging_steps", "5")
PER_RUN = 20


@given(st.integers(0, 300), st.integers(1, 60), st.integers(1, 4))
def test_the_steps_of_a_period_are_those_after_which_it_is_due(steps, period, times):
    one = Period(period, min(times, period))
    assert one.due_steps(steps) == {step for step in range(1, steps + 1) if one.is_due(step)}


@given(st.integers(1, 300_000), st.integers(1, 5_000))
def test_the_period_that_the_program_chooses(total, steps_per_epoch):
    due = sorted(automatic_period(total, steps_per_epoch).due_steps(total))
    assert len(due) <= MOST_EVENTS
    gaps = [later - earlier for earlier, later in zip([0, *due], due)]
    assert all(gap >= min(steps_per_epoch, LONG_EPOCH_STEPS) for gap in gaps)
    if steps_per_epoch <= LONG_EPOCH_STEPS:
        assert all(step % steps_per_epoch == 0 for step in due)
        assert len(due) >= min(MOST_EVENTS // 2, total // steps_per_epoch)


@pytest.mark.parametrize(
    ("total", "steps_per_epoch", "expected"),
    [
        (120, 12, Period(12)),  # ten epochs of 200 images: each of them
        (4368, 12, Period(19 * 12)),  # 364 epochs of 200 images
        (240, 12, Period(12)),
        (241, 12, Period(24)),
        (10_000, 2500, Period(2500, 2)),  # four epochs of 40,000 images: in their middle as well
        (100_000, 25_000, Period(25_000, 5)),
        (500, 2500, Period(2500, 2)),  # it ends before the first one is due
    ],
)
def test_examples_of_the_chosen_period(total, steps_per_epoch, expected):
    assert automatic_period(total, steps_per_epoch) == expected


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({}, [20, 40, 60]),
        ({"validation_epochs": 1}, [10, 20, 30, 40, 50, 60]),
        ({"validation_steps": 25}, [25, 50]),
        ({"validation_steps": 25, "validation_epochs": 3}, [25, 30, 50, 60]),
        ({"validation_epochs": 0}, []),
        ({"validation_steps": 0}, []),
        ({"validation_steps": 0, "validation_epochs": 3}, [30, 60]),
    ],
)
def test_what_the_user_gives_is_all_that_counts(settings, due):
    """A run of 30 epochs of 10 steps; its first 60 steps."""
    cadence = Cadence(CadenceConfig(**settings), 10, 300)
    assert [step for step in range(61) if cadence.validation_due(step)] == due
    assert sorted(step for step in cadence.validation_steps() if step <= 60) == due


def test_by_default_checkpoints_and_measurements_do_not_fall_due_by_steps():
    cadence = Cadence(CadenceConfig(), 10, 300)
    assert cadence.checkpoint_steps() == cadence.evaluation_steps() == cadence.copies_steps() == set()
    assert len(cadence.preview_steps()) == len(cadence.validation_steps()) == 15


def test_a_frequent_event_is_worth_a_warning():
    config = CadenceConfig(validation_epochs=1, preview_steps=100, checkpointing_steps=10)
    first, second = Cadence(config, 12, 4368).warnings()
    assert first.startswith("--validation_epochs 1 is due 364 times in this run of 4,368 steps")
    assert second.startswith("--checkpointing_steps 10 is due 436 times")
    assert Cadence(CadenceConfig(), 12, 4368).warnings() == []


def test_the_clock_of_checkpoints():
    clock, never = CheckpointClock(0.2 / 60), CheckpointClock(0)
    assert not clock.is_due()
    time.sleep(0.21)
    assert clock.is_due()
    assert not never.is_due()
    clock.restart()
    assert not clock.is_due()
    clock.mark()
    time.sleep(0.15)
    clock.restart(from_mark=True)
    assert not clock.is_due()
    time.sleep(0.06)
    assert clock.is_due(), "0.2 s have passed since the checkpoint that was held"


def checkpoints(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")}


def _wait_for_a_checkpoint(folder: Path, step: int, child: Child) -> None:
    """Wait until the run has a checkpoint of `step` or later, or has ended."""
    wait_until(lambda: child.has_ended() or max(checkpoints(folder), default=0) >= step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run without checkpoints by time."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, *LONG, "--checkpointing_minutes", "0") == 0
    return folder


def test_a_run_validates_at_most_twenty_times(whole):
    validated = [int(row["step"]) for row in rows(whole) if row["val_loss"]]
    assert validated == list(range(6, 121, 6))
    assert len(validated) == PER_RUN


def test_rows_do_not_depend_on_checkpoints_by_time(tmp_path, whole):
    kept = ("--checkpoints_total_limit", "500")
    assert run(tmp_path / "run", *LONG, *kept, "--checkpointing_minutes", str(0.02 / 60)) == 0
    assert_same_state(tmp_path / "run", whole)
    between = checkpoints(tmp_path / "run") - set(range(0, 121, 6))
    assert len(between) > 10, "hardly any checkpoint fell due by time"


def test_rows_are_the_same_after_kills_and_interruptions(tmp_path, whole):
    """Each session has another time between checkpoints and ends in another way, at a moment that nobody chose."""
    folder = tmp_path / "run"
    for minutes, end in ((0.05 / 60, signal.SIGKILL), (0.0, signal.SIGTERM), (0.01 / 60, signal.SIGKILL)):
        before = max(checkpoints(folder), default=0)
        flags = (*LONG, "--slow_seconds", "0.002", "--checkpointing_minutes", str(minutes))
        child = Child(lambda flags=flags: run(folder, *flags), tmp_path / "out.txt")
        _wait_for_a_checkpoint(folder, before + 10, child)
        assert not child.has_ended(), (tmp_path / "out.txt").read_text()
        os.kill(child.pid, end)
        child.wait()
    assert run(folder, *LONG) == 0
    assert json.loads((folder / "checkpoints/latest/trainer_state.json").read_text())["sessions"] >= 3
    assert rows(folder) == rows(whole)


@pytest.mark.slow
def test_all_processes_save_when_the_main_process_finds_that_it_is_time(tmp_path):
    flags = ("--train_batch_size", "4", "--num_train_epochs", "10", "--logging_steps", "5", "--critic", "true")
    toy(tmp_path / "plain", *flags, "--checkpointing_minutes", "0", processes=2)
    timed = (*flags, "--checkpoints_total_limit", "500", "--checkpointing_minutes", str(0.05 / 60))
    toy(tmp_path / "timed", *timed, processes=2)
    assert_same_state(tmp_path / "timed", tmp_path / "plain")
    assert len(checkpoints(tmp_path / "timed") - set(range(0, 61, 6))) > 3


def test_a_run_with_the_settings_of_an_earlier_version_keeps_its_rows(tmp_path):
    """Earlier versions saved the numbers that they used where the user had given none."""
    earlier = {
        "validation_epochs": 1, "validation_steps": 0, "preview_epochs": 1, "preview_steps": 0,
        "checkpointing_epochs": 1, "checkpointing_steps": 0, "lr_warmup_steps": 100, "mixed_precision": None,
    }  # fmt: skip
    saved = ToyConfig().to_dict() | earlier
    config = ToyConfig()
    config.keep(saved)
    assert {name: config.to_dict()[name] for name in earlier} == earlier | {"mixed_precision": "auto"}
    given = ToyConfig(validation_steps=50)
    given.keep(saved)
    assert (given.validation_steps, given.validation_epochs) == (50, 1)

    flags = ("--validation_epochs", "1", "--validation_steps", "0", "--mixed_precision", "no")
    assert run(tmp_path / "run", *LONG, *flags, "--signal_step", "50") == 75
    assert run(tmp_path / "run", *LONG) == 0
    assert [int(row["step"]) for row in rows(tmp_path / "run") if row["val_loss"]] == list(range(3, 121, 3))
    assert "changed settings" not in (tmp_path / "run" / "run.log").read_text()
