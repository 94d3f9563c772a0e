"""What a person sees in the trackers of real runs, read back from the files of W&B, TensorBoard and Trackio."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.environments import environment_with
from tests.support.runs import TOY, environment, launch, rows
from tests.support.wandb_files import wandb_history, wandb_ids, wandb_records, wandb_summary

pytestmark = pytest.mark.slow

GROUPS = {"loss", "validation", "optimizer", "throughput", "memory", "best"}


def toy(folder: Path, report_to: str, *flags: str) -> None:
    done = launch(
        TOY, "--output_dir", str(folder), "--report_to", report_to, "--cpu_threads", "1", "--logging_steps", "1", *flags
    )
    assert done.returncode == 0, done.stderr


def groups(names) -> set[str]:
    return {name.split("/")[0] for name in names if "/" in name and not name.startswith("summary/")}


@pytest.fixture(scope="module")
def resumed_run(tmp_path_factory) -> Path:
    """A run of two sessions, recorded by W&B (offline) and TensorBoard."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    for steps in ("4", "6"):
        toy(folder, "wandb,tensorboard", "--max_train_steps", steps, "--validation_steps", "2")
    return folder


def test_wandb_has_groups_and_the_columns_of_metrics_csv(resumed_run):
    history = wandb_history(resumed_run)
    assert groups(name for row in history for name in row) == GROUPS
    table = rows(resumed_run)
    for column in ("loss", "grad_norm", "learning_rate"):
        group = "loss" if column == "loss" else "optimizer"
        logged = {row["step"]: row[f"{group}/{column}"] for row in history if f"{group}/{column}" in row}
        assert logged == {int(row["step"]): float(row[column]) for row in table}
    assert all(row["memory/memory_mib"] > 10 for row in history if "memory/memory_mib" in row)


def test_wandb_has_the_best_metric_as_its_summary(resumed_run):
    """The summary of a run is the last value of each metric, so it is right even if the run never ends."""
    validated = [row for row in wandb_history(resumed_run) if "validation/val_loss" in row]
    assert len(validated) > 2
    best = min(validated, key=lambda row: row["validation/val_loss"])
    assert validated[-1]["best/val_loss"] == best["validation/val_loss"]
    assert validated[-1]["best/step"] == best["step"]
    assert wandb_summary(resumed_run)["best"] == {
        "metric": "val_loss", "value": best["validation/val_loss"], "step": best["step"],
    }  # fmt: skip


def test_a_resumed_run_continues_its_own_record(resumed_run):
    ids = wandb_ids(resumed_run)
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert [row["step"] for row in wandb_history(resumed_run) if "loss/loss" in row] == [1, 2, 3, 4, 5, 6]


def test_wandb_draws_every_chart_over_the_steps(resumed_run):
    definitions = [r.metric for r in wandb_records(resumed_run) if r.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in definitions)


def test_tensorboard_has_the_same_groups(resumed_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed_run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    assert groups(names) == GROUPS
    assert [event.step for event in events.Scalars("loss/loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("summary/best.value")[-1].value == pytest.approx(events.Scalars("best/val_loss")[-1].value)


TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
runs = {run.name: SQLiteStorage.get_logs("halftone", run.name, run_id=run.id) for run in trackio.Api().runs("halftone")}
print(json.dumps(runs, default=str))
"""


@pytest.mark.slow
def test_trackio_has_the_same_groups_and_each_run_continues_its_own(tmp_path):
    """Two run folders of the same name; the first is resumed after the second has begun."""
    python = environment_with(tmp_path / "venv", "trackio>=0.43,<1")
    variables = environment(TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    for folder, steps in (("a/run", "4"), ("b/run", "2"), ("a/run", "6")):
        flags = ("--report_to", "trackio", "--cpu_threads", "1", "--logging_steps", "1", "--validation_steps", "2")
        command = [python, str(TOY), "--output_dir", str(tmp_path / folder), "--max_train_steps", steps, *flags]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "trackio show --project halftone" in done.stdout + done.stderr
    read = subprocess.run([python, "-c", TRACKIO], env=variables, capture_output=True, text=True, check=True)
    runs = json.loads(read.stdout.splitlines()[-1])
    first = runs.pop("run")
    ((other, second),) = runs.items()
    assert other.startswith("run-")
    assert [row["step"] for row in first if "loss/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in second if "loss/loss" in row] == [1, 2]
    assert groups(name for row in first for name in row) == GROUPS
    assert first[-1]["summary/best.value"] == min(row["best/val_loss"] for row in first if "best/val_loss" in row)


@pytest.mark.slow
def test_trackio_starts_although_the_hub_does_not_answer(tmp_path):
    """Trackio asks the Hub for the owner of a token when it starts."""
    python = environment_with(tmp_path / "venv", "trackio>=0.43,<1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables = environment(
            TRACKIO_DIR=str(tmp_path / "trackio"),
            HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}",
            HF_TOKEN="hf_" + "a" * 34,
            HF_HUB_OFFLINE="0",
            PYTHONPATH=str(ROOT),
        )
        flags = ("--report_to", "trackio", "--cpu_threads", "1", "--max_train_steps", "1")
        command = [python, str(TOY), "--output_dir", str(tmp_path / "run"), *flags]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "trackio show --project halftone" in done.stdout + done.stderr
