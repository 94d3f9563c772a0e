"""`--profile_steps` writes a trace of some steps, and changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import tensors
from tests.support.toy_runs import assert_equal, run


def optimizer_steps(folder: Path) -> int:
    """Return the number of optimizer steps in the trace of a run."""
    events = json.loads((folder / "profile.json").read_text())["traceEvents"]
    return sum(event.get("name", "").startswith("Optimizer.step#") for event in events)


# Six steps.
@pytest.mark.parametrize(
    ("asked", "traced"), [(2, 2), (100, 6), *(pytest.param(k, k, marks=pytest.mark.slow) for k in (3, 5, 6))]
)
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, capsys, asked, traced):
    run(tmp_path / "run", "--profile_steps", str(asked))
    assert optimizer_steps(tmp_path / "run") == traced
    assert f"a trace of {traced} steps was written to {tmp_path}/run/profile.json" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob(".*profile*"))


def test_tracing_changes_nothing_else(tmp_path):
    run(tmp_path / "plain")
    assert not (tmp_path / "plain/profile.json").exists()
    run(tmp_path / "traced", "--profile_steps", "2")
    assert_equal(tensors(tmp_path / "plain"), tensors(tmp_path / "traced"))


def test_a_trace_of_a_session_that_is_stopped_is_written(tmp_path):
    assert run(tmp_path / "run", "--profile_steps", "100", "--num_train_epochs", "4", "--signal_step", "4") == 75
    assert 0 < optimizer_steps(tmp_path / "run") < 7


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "run/profile.json").mkdir(parents=True)
    (tmp_path / "run/checkpoints").mkdir()
    assert run(tmp_path / "run", "--profile_steps", "2") == 0
    assert "profile.json could not be written" in (tmp_path / "run/run.log").read_text()
