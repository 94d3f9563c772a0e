"""run_experiments.py as users start it: six tiny experiments of which one fails, a stop, and resuming the series."""

from __future__ import annotations

import csv
import json
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.support.runs import ROOT, command, environment, launch
from tests.support.wandb_files import wandb_records
from training.core.parsing import parse_config
from training.experiments.registry import config_class

SCRIPT = ROOT / "training/run_experiments.py"
pytestmark = pytest.mark.slow

EXPERIMENTS = {
    "base": {},
    "narrow": {"model": {"block_out_channels": [16, 16]}},
    "v": {"prediction_type": "v_prediction", "timestep_sampling": "uniform"},
    "labelled": {"condition_on": ["caption", "label"]},
    "misspelt": {"balance_by": "labell"},
    "clipped": {"max_grad_norm": 0.1},
}


@pytest.fixture
def configs(tmp_path, diffusion_flags) -> list[str]:
    """The tiny flags of these tests as six files, which differ in one setting each."""
    base = parse_config(config_class("latent_diffusion"), [*diffusion_flags, "--max_train_steps", "6"]).to_dict()
    files = []
    for name, changed in EXPERIMENTS.items():
        values = {**base, **changed, "output_dir": f"{tmp_path}/runs/{name}", "preview_epochs": 0}
        values["model"] = {**base["model"], **changed.get("model", {})}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        files.append(str(file))
    return files


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "comparison.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.mark.long
def test_six_experiments_with_one_command(tmp_path, configs):
    """One names a missing column, which is noticed when its data are opened: it fails, and the others still run."""
    done = launch(SCRIPT, *configs, "--num_samples", "3", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    rows = table(tmp_path / "runs")
    assert list(rows) == list(EXPERIMENTS)
    outcomes = {name: row["outcome"] for name, row in rows.items()}
    assert outcomes.pop("misspelt") == "failed with exit status 2"
    assert set(outcomes.values()) == {"finished"}
    assert rows["narrow"]["model.block_out_channels"] == "[16, 16]"
    assert int(rows["narrow"]["parameters"]) < int(rows["base"]["parameters"])
    assert {rows[name]["steps"] for name in outcomes} == {"6"}
    for name in outcomes:
        for column in ("val_loss", "best_val_loss", "images_per_second", "training_seconds", "peak_memory_mib"):
            assert float(rows[name][column]) > 0, (name, column)
    text = (tmp_path / "runs/comparison.md").read_text()
    assert "cannot be compared between rows that differ in prediction_type" in text
    image = Image.open(tmp_path / "runs/comparison.png")
    assert image.width > 3 * 192
    assert image.height > 5 * 192
    assert len(set(image.resize((64, 64)).getdata())) > 50
    before = {name: (tmp_path / f"runs/{name}/record.json").stat().st_mtime_ns for name in outcomes}
    again = launch(SCRIPT, *configs, "--print_commands", cwd=tmp_path)
    assert again.stdout.count("# finished") == len(outcomes)
    done = launch(SCRIPT, *(file for file in configs if "misspelt" not in file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already finished") == len(outcomes)
    assert {name: (tmp_path / f"runs/{name}/record.json").stat().st_mtime_ns for name in outcomes} == before


def test_a_stop_reaches_the_run_and_the_same_command_resumes(tmp_path, configs):
    flags = [*configs[:2], "--num_samples", "2", "--", "--max_train_steps", "400", "--checkpointing_epochs", "0"]
    series = subprocess.Popen(
        command(SCRIPT, *flags), env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not (tmp_path / "runs/base/metrics.csv").is_file():
        assert series.poll() is None, series.communicate()
        time.sleep(0.05)
    series.send_signal(signal.SIGTERM)
    output, errors = series.communicate(timeout=300)
    assert series.returncode == 75, errors
    assert "run the same command again to resume it" in output
    assert not (tmp_path / "runs/narrow").exists()
    rows = table(tmp_path / "runs")
    assert (rows["base"]["outcome"], rows["narrow"]["outcome"]) == ("unfinished", "not begun")
    stopped_at = json.loads((tmp_path / "runs/base/checkpoints/latest/trainer_state.json").read_text())["step"]
    assert 0 < stopped_at < 400
    resumed = [*configs[:2], "--num_samples", "2", "--", "--max_train_steps", str(stopped_at + 2)]
    done = launch(SCRIPT, *resumed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"at step {stopped_at}" in done.stdout + done.stderr
    assert {row["steps"] for row in table(tmp_path / "runs").values()} == {str(stopped_at + 2)}
    assert (tmp_path / "runs/comparison.png").is_file()


def test_a_sweep_with_seeds_is_trained_compared_and_continued(tmp_path, configs):
    words = [configs[0], "--sweep", "learning_rate=1e-3,2e-3", "--num_samples", "1"]
    flags = ["--", "--max_train_steps", "2", "--report_to", "wandb"]
    done = launch(SCRIPT, *words, "--seeds", "2", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/base_sweep"
    runs = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert runs == [f"learning_rate_{rate}_seed_{seed}" for rate in ("1e-3", "2e-3") for seed in (0, 1)]
    with (folder / "comparison_seeds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["learning_rate"], row["n"]) for row in rows] == [("0.001", "2"), ("0.002", "2")]
    losses = [float(row["val_loss"]) for row in table(folder).values()]
    assert [float(row["val_loss_mean"]) for row in rows] == [
        pytest.approx(statistics.fmean(losses[:2])), pytest.approx(statistics.fmean(losses[2:])),
    ]  # fmt: skip
    assert float(rows[0]["val_loss_std"]) == pytest.approx(statistics.stdev(losses[:2]))
    assert "±" in (folder / "comparison.md").read_text()
    started = [r.run for r in wandb_records(folder / runs[0]) if r.WhichOneof("record_type") == "run"]
    assert started[0].run_group == "base learning_rate=1e-3"
    done = launch(SCRIPT, *words, "--seeds", "3", "--dry_run", *flags, cwd=tmp_path)
    assert [line.endswith("# finished") for line in done.stdout.splitlines()] == [True, True, False] * 2
