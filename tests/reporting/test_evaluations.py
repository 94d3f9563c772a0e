"""An evaluation after the end of a run is added to the summary of that run in its trackers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.environments import environment_with
from tests.support.runs import TOY, environment, launch
from tests.support.wandb_files import wandb_history, wandb_ids, wandb_summary
from training.run.folder import RunFolder

pytestmark = pytest.mark.slow

RESULTS = {
    "metrics": {"kid": 0.125, "fd": 7, "scheduler": "words"},
    "floor": {"images": 8, "splits": 20, "kid": {"mean": -0.25, "std": 0.5}},
    "copies": [{"space": "pixels", "copy_rate": 0.5, "false_positive_rate": 0.0625}],
    "num_images": 16,
    "step": 4,
}
SUMMARY = {
    "quality/kid": 0.125, "quality/fd": 7.0, "quality/kid_floor": -0.25, "quality/copy_rate_pixels": 0.5,
    "quality/copy_rate_pixels_expected": 0.0625, "quality/evaluated_images": 16.0, "quality/evaluated_step": 4.0,
}  # fmt: skip
REPORT = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from training.reporting.evaluations import report_evaluation
PartialState()
report_evaluation(Path(sys.argv[1]), json.loads(sys.argv[2]), *sys.argv[3:])
"""


def toy(folder: Path, report_to: str) -> Path:
    flags = ("--cpu_threads", "1", "--logging_steps", "1", "--max_train_steps", "4")
    done = launch(TOY, "--output_dir", str(folder), "--report_to", report_to, *flags)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    return toy(tmp_path_factory.mktemp("complete") / "run", "wandb,tensorboard")


@pytest.fixture
def folder(complete, tmp_path) -> Path:
    return shutil.copytree(complete, tmp_path / "run", symlinks=True)


def report(folder: Path, *words: str, python: str = "", **variables: str) -> str:
    """Report in a process of its own, as evaluate.py does; return what it printed."""
    command = [python or sys.executable, "-c", REPORT, str(folder), json.dumps(RESULTS), *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT), **variables), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_and_tensorboard_get_the_metrics_in_the_same_run(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = wandb_history(folder)
    assert "warning" not in report(folder)
    ids = wandb_ids(folder)
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert SUMMARY.items() <= wandb_summary(folder).items()
    assert wandb_history(folder) == before
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for name, value in SUMMARY.items():
        assert events.Scalars(f"summary/{name}")[-1].value == value
    assert [event.step for event in events.Scalars("loss/loss")] == [1, 2, 3, 4]  # nothing is hidden


def test_none_records_nothing_and_the_command_can_name_another_tracker(folder):
    before = sorted(folder.rglob("*"))
    report(folder, "none")
    assert sorted(folder.rglob("*")) == before
    report(folder, "tensorboard")
    assert len(wandb_ids(folder)) == 1
    assert set(folder.rglob("*")) - set(before) == {*(folder / "tensorboard").glob("events*")} - set(before) != set()


def test_a_tracker_that_fails_and_a_run_that_is_trained_cost_a_warning(folder):
    shutil.rmtree(folder / "wandb")
    (folder / "wandb").write_text("in the way")
    assert "warning: wandb could not be started" in report(folder)
    with RunFolder(folder).lock:
        assert "do not get the metrics of this evaluation: another process is training" in report(folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("report_to: wandb,tensorboard", "report_to: unknown"))
    assert "do not get the metrics of this evaluation: --report_to unknown" in report(folder)


def test_a_service_that_cannot_be_reached_ends_nothing(folder):
    key = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    assert "recording offline" in report(folder, "wandb", WANDB_INIT_TIMEOUT="3", **key)
    assert SUMMARY.items() <= wandb_summary(folder).items()


TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
runs = {run.name: SQLiteStorage.get_logs("halftone", run.name, run_id=run.id) for run in trackio.Api().runs("halftone")}
print(json.dumps(runs, default=str))
"""


def test_trackio_gets_the_metrics_in_the_same_run(tmp_path):
    python = environment_with(tmp_path / "venv", "trackio>=0.43,<1")
    variables = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    flags = ("--report_to", "trackio", "--cpu_threads", "1", "--logging_steps", "1", "--max_train_steps", "4")
    done = subprocess.run(
        [python, str(TOY), "--output_dir", str(tmp_path / "run"), *flags],
        cwd=ROOT, env=environment(PYTHONPATH=str(ROOT), **variables), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning" not in report(tmp_path / "run", python=python, **variables)
    read = subprocess.run(
        [python, "-c", TRACKIO], env=environment(**variables), capture_output=True, text=True, check=True
    )
    ((name, rows),) = json.loads(read.stdout.splitlines()[-1]).items()
    assert name == "run"
    assert [row["step"] for row in rows if "loss/loss" in row] == [1, 2, 3, 4]
    assert {key: rows[-1].get(f"summary/{key}") for key in SUMMARY} == SUMMARY
