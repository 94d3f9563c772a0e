"""Values that are read late give the same run as values that are read in each step."""

from __future__ import annotations

import pytest

from pipelines.tools.cli import UserError
from tests.support.no_waiting import no_waiting
from tests.support.runs import assert_same_state, rows
from tests.support.toy_runs import EVERY_STEP, run, state_of
from training.engine import optimizers, step_values
from training.engine.loop import Loop
from training.engine.step_values import MOST_STEPS, Requests, Waiting, steps_in_a_second

# 48 steps of 8 samples, and a few bad rows; gradients are clipped in most steps.
LONG = ("--num_train_epochs", "8", "--max_grad_norm", "0.5", "--preview_epochs", "0", "--validation_epochs", "4")
SELDOM = (*LONG, "--logging_steps", "1000", "--bad_rows", "[3, 20]", "--critic", "true")


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The number of steps of each reading."""
    counted: list[int] = []
    read = Waiting.read

    def count(self):
        counted.append(len(self))
        return read(self)

    monkeypatch.setattr(Waiting, "read", count)
    return counted


def named_rows(folder) -> list[str]:
    return [line.split(" ", 2)[2] for line in (folder / "run.log").read_text().splitlines() if "is not finite" in line]


@pytest.mark.parametrize("ema_update_every", ["1", "3"])
def test_a_run_is_the_same_whether_its_steps_wait_or_not(tmp_path, monkeypatch, reads, ema_update_every):
    flags = (*SELDOM, "--ema_update_every", ema_update_every)
    run(tmp_path / "late", *flags)
    assert sum(reads) == 48
    assert max(reads) > 1
    reads.clear()
    with monkeypatch.context() as waiting:
        waiting.setattr(optimizers, "can_leave_out_steps", lambda optimizer: False)
        waiting.setattr(step_values, "MOST_STEPS", 1)
        run(tmp_path / "each", *flags)
    assert set(reads) == {1}
    assert_same_state(tmp_path / "late", tmp_path / "each")
    assert len(named_rows(tmp_path / "late")) > state_of(tmp_path / "late")["skipped_steps"] > 10
    assert named_rows(tmp_path / "late") == named_rows(tmp_path / "each")


def test_values_are_read_for_events_and_otherwise_seldom(tmp_path, monkeypatch, reads):
    monkeypatch.setattr(step_values, "MOST_SECONDS", 60.0)
    run(tmp_path / "run", *LONG, "--logging_steps", "1000")
    # The second step tells the time of the first. After that, only the ends of the epochs have a row: every 6 steps.
    assert reads == [1, 1, 4, *[6] * 7]
    reads.clear()
    run(tmp_path / "saving", *LONG, "--logging_steps", "1000", *EVERY_STEP)
    assert reads == [1] * 48
    reads.clear()
    run(tmp_path / "rows", *LONG, "--logging_steps", "4", "--num_train_epochs", "2")
    assert reads == [1, 1, 2, 2, 2, 4]


def test_a_training_step_reads_nothing(tmp_path, monkeypatch):
    step = Loop.step

    def watched(self, batches):
        with no_waiting():
            step(self, batches)

    monkeypatch.setattr(Loop, "step", watched)
    run(tmp_path / "run", *SELDOM, "--gradient_accumulation_steps", "2")
    with pytest.raises(AssertionError, match="waits for the device"):
        run(tmp_path / "sgd", "--optimizer", "sgd")


def test_steps_in_a_row_that_are_not_finite_end_the_run_at_the_step_that_is_one_too_many(tmp_path, monkeypatch, reads):
    """The values of later steps are then on the device already; they leave no trace."""
    monkeypatch.setattr(step_values, "MOST_SECONDS", 60.0)
    run(tmp_path / "run", "--num_train_epochs", "1")
    flags = (*SELDOM, "--bad_rows", str(list(range(48))), "--max_nonfinite_steps", "3")
    with pytest.raises(UserError, match=r"^3 steps in a row .* not finite, up to step 9; .*`latest` \(step-00000006\)"):
        run(tmp_path / "run", *flags, "--critic", "false")
    assert reads[-1] == 4
    assert (state_of(tmp_path / "run")["step"], rows(tmp_path / "run")[-1]["step"]) == (6, "6")


def test_a_request_to_stop_ends_the_run_after_the_next_step(tmp_path, monkeypatch):
    """One process need not ask the others, so that it does not wait for the next reading."""
    monkeypatch.setattr(step_values, "MOST_SECONDS", 60.0)
    assert run(tmp_path / "run", *LONG, "--logging_steps", "1000", "--signal_step", "9") == 75
    assert state_of(tmp_path / "run")["step"] == 10
    run(tmp_path / "whole", *LONG, "--logging_steps", "1000")
    run(tmp_path / "run", *LONG, "--logging_steps", "1000")
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_the_number_of_steps_between_readings_follows_from_the_agreed_time_of_a_step():
    def steps(seconds: float) -> int:
        return steps_in_a_second([Requests(seconds=9.0), Requests(seconds=seconds)])

    assert [steps(seconds) for seconds in (0.0, 0.001, 0.2, 0.3, 0.6, 5.0)] == [1, MOST_STEPS, 5, 3, 1, 1]
    assert steps_in_a_second([]) == 1
