"""What a person sees in the trackers of real runs, read back from the files of W&B, TensorBoard and Trackio."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.environments import environment_with
from tests.support.runs import TOY, environment, launch, rows
from tests.support.wandb_files import wandb_history, wandb_ids, wandb_records, wandb_summary

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
runs = {run.name: run for run in trackio.Api().runs("halftone")}
print(json.dumps({name: [run.metrics(), run.history()] for name, run in runs.items()}, default=str))
"""


@pytest.mark.slow
def test_trackio_has_the_same_groups_and_each_run_continues_its_own(tmp_path):
    """Two run folders of the same name; the first is resumed after the second has begun."""
    python = environment_with(tmp_path / "venv", "trackio>=0.43,<1")
    variables = environment(TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    for folder, steps in (("a/run", "4"), ("b/run", "2"), ("a/run", "6")):
        flags = ("--report_to", "trackio", "--cpu_threads", "1", "--logging_steps", "1", "--validation_steps", "2")
        command = [python, str(TOY), "--output_dir", str(tmp_path / folder), "--max_train_steps", steps, *flags]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "trackio show --project halftone" in done.stdout + done.stderr
    read = subprocess.run([python, "-c", TRACKIO], env=variables, capture_output=True, text=True, check=True)
    runs = json.loads(read.stdout.splitlines()[-1])
    first, second = runs.pop("run"), runs.popitem()
    assert not runs
    assert second[0].startswith("run-")
    assert steps_of(first) == [1, 2, 3, 4, 5, 6]
    assert steps_of(second[1]) == [1, 2]
    assert groups(first[0]) == GROUPS


def steps_of(run: list) -> list[int]:
    return [row["step"] for row in run[1] if "loss/loss" in row]
