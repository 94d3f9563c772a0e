"""The comparison of runs: the settings that differ, their metrics, CSV and Markdown; and the series of experiments."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.tools.cli import UserError
from tests.conftest import ROOT
from tests.support.tiny_models import tiny_pipeline
from training import run_experiments
from training.core.parsing import parse_config
from training.core.previews import save_png
from training.experiments.comparison import (
    Samples,
    Table,
    comparison_table,
    differing_settings,
    draw_samples,
    table_csv,
    table_markdown,
    write_comparison,
)
from training.experiments.registry import config_class
from training.run.folder import RunFolder
from training.run_experiments import common_folder, is_finished, parse_arguments, plan

TINY = "configs/experiments/latent_diffusion/ablation/tiny"


def leave_behind(folder: RunFolder, config, *, steps: int = 40, stopped_early: bool = False, exported: bool = True):
    """Write the files of a run that the comparison reads: 160 images, ten steps per epoch."""
    folder.create()
    folder.release()
    folder.save_config(config.to_dict())
    rows = [(10, 0.9, ""), (20, 0.5, "0.61"), (30, 0.4, "0.52"), (steps, 0.3, "0.55")]
    text = "step,loss,val_loss\n" + "".join(f"{step},{loss},{validated}\n" for step, loss, validated in rows)
    folder.metrics_file.write_text(text)
    checkpoint = folder.checkpoints / "latest"
    checkpoint.mkdir(exist_ok=True)
    state = {
        "step": steps, "best_value": 0.52, "best_step": 30, "elapsed_seconds": 32.0, "images_seen": steps * 16,
        "stopped_early": stopped_early,
    }  # fmt: skip
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    if exported:
        folder.pipeline.mkdir(exist_ok=True)
        (folder.pipeline / "model_index.json").write_text('{"_class_name": "LatentDiffusionPipeline"}')
        record = {"steps": steps, "num_train_images": 165, "global_batch_size": 16}
        folder.save_record({**record, "trained_parameters": 1_234_567, "peak_memory_mib": 801.5})


def latent_config(folder: Path, *flags: str):
    words = ["--output_dir", str(folder), "--vae", "v", "--tokenizer", "t", "--max_train_steps", "40"]
    return parse_config(config_class("latent_diffusion"), [*words, *flags])


@pytest.fixture
def runs(tmp_path):
    by_name = {}
    for name, flags in {
        "narrow": ("--model.block_out_channels", "[32,32]"),
        "wide": ("--model.block_out_channels", "[64,64]", "--balance_by", "label", "--num_train_epochs", "3"),
    }.items():
        config = latent_config(tmp_path / name, *flags)
        by_name[name] = ("latent_diffusion", RunFolder(tmp_path / name), config)
    return by_name


def test_a_row_has_the_differing_settings_and_the_metrics(runs):
    leave_behind(runs["narrow"][1], runs["narrow"][2])
    table = comparison_table(runs, {"narrow": "finished", "wide": "failed with exit status 1"})
    assert table.differing == ["balance_by", "model.block_out_channels"]  # not lengths and folders
    narrow, wide = table.rows
    assert narrow["model.block_out_channels"] == [32, 32]
    assert (wide["balance_by"], wide["outcome"]) == ("label", "failed with exit status 1")
    assert "steps" not in wide
    metrics = {key: narrow[key] for key in narrow if key not in ("name", "outcome", *table.differing)}
    assert metrics == {
        "parameters": 1_234_567, "steps": 40, "val_loss": 0.55, "best_val_loss": 0.52, "best_step": 30,
        "images_per_second": 20.0, "training_seconds": 32.0, "peak_memory_mib": 801.5,
    }  # fmt: skip
    assert table.columns[:2] == ["name", "outcome"]
    assert set(table.columns) == set(narrow) | set(wide)


def test_files_hold_the_same_metrics(runs, tmp_path):
    leave_behind(runs["narrow"][1], runs["narrow"][2])
    leave_behind(runs["wide"][1], runs["wide"][2])
    table = comparison_table(runs, {"narrow": "finished", "wide": "finished"})
    written = write_comparison(tmp_path / "out", table, None)
    assert [path.name for path in written] == ["comparison.csv", "comparison.md"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/comparison.csv").read_text())))
    assert [row["name"] for row in rows] == ["narrow", "wide"]
    assert float(rows[0]["best_val_loss"]) == 0.52
    text = (tmp_path / "out/comparison.md").read_text()
    assert "| narrow | finished |" in text
    assert "1,234,567" in text
    assert "cannot be compared" not in text
    assert "![" not in text


def test_a_warning_about_losses_that_cannot_be_compared():
    rows = [{"name": "a", "prediction_type": "epsilon", "val_loss": 1.0}, {"name": "b", "prediction_type": "x|y"}]
    text = table_markdown(Table(["name", "prediction_type", "val_loss"], rows, ["prediction_type"]), "comparison.png")
    assert "cannot be compared between rows that differ in prediction_type" in text
    assert "![samples](comparison.png)" in text
    assert "x\\|y" in text
    assert table_csv(Table(["name"], [{"name": "a,b"}], [])) == 'name\n"a,b"\n'


def test_settings_that_differ():
    assert differing_settings([{"a": 1, "b": [1]}, {"a": 1, "b": [2], "c": None}, {"a": 1, "b": [1]}]) == ["b"]
    assert differing_settings([{"a": 1}, {"a": 1, "c": 3}]) == ["c"]


def save_tiny_run(folder: Path, **options):
    """Save a run whose pipeline generates images; returns (stage, folder, config)."""
    tiny_pipeline("flow_prediction", **options).save_pretrained(folder / "pipeline")
    return "latent_diffusion", RunFolder(folder), latent_config(folder, "--preview_inference_steps", "2")


def test_rows_of_samples_are_from_the_same_seeds_and_prompts(tmp_path):
    runs = {
        "one": save_tiny_run(tmp_path / "one"),
        "the same": save_tiny_run(tmp_path / "two"),
        "with classes": save_tiny_run(tmp_path / "three", classes=3),
    }
    runs["not there"] = ("latent_diffusion", RunFolder(tmp_path / "four"), runs["one"][2])
    samples = Samples(["red poster", "blue circles"], 3, seed=5)
    polled = []
    image = draw_samples(runs, samples, lambda: polled.append(1))
    assert len(polled) == 3
    alone = [draw_samples({name: runs[name]}, samples) for name in ("one", "the same")]
    assert alone[0].tobytes() != draw_samples({"one": runs["one"]}, Samples(samples.prompts, 3, seed=6)).tobytes()
    pixels = [np.asarray(sheet.crop((100, 0, *sheet.size))) for sheet in alone]  # without their titles
    width = min(part.shape[1] for part in pixels)
    assert np.array_equal(*(part[:, -width:] for part in pixels))
    # A pipeline that does not sample from noise shows its previews below.
    autoencoder = RunFolder(tmp_path / "five")
    save_png(Image.new("RGB", (300, 111)), autoencoder.pipeline / "samples.png")
    (autoencoder.pipeline / "model_index.json").write_text('{"_class_name": ["autoencoder", "AutoencoderPipeline"]}')
    mixed = draw_samples({**runs, "autoencoder": ("autoencoder", autoencoder, runs["one"][2])}, samples)
    assert mixed.height > image.height + 111
    assert draw_samples({"not there": runs["not there"]}, samples) is None


# --- the series ------------------------------------------------------------------------------------------------------


def experiment_files(folder: Path, **extra: str) -> list[str]:
    (folder / "latent_diffusion").mkdir(exist_ok=True)
    files = []
    for name, lines in {"one": "learning_rate: 1.0e-3", "two": "learning_rate: 2.0e-3", **extra}.items():
        file = folder / "latent_diffusion" / f"{name}.yaml"
        file.write_text(f"output_dir: {folder}/runs/{name}\nvae: v\ntokenizer: t\nmax_train_steps: 40\n{lines}\n")
        files.append(str(file))
    return files


def test_commands_are_printed_as_one_would_type_them(tmp_path, capsys):
    files = experiment_files(tmp_path)
    first = plan(files, [])[0]
    leave_behind(first.folder, first.config)
    assert run_experiments.main([*files, "--print_commands", "--", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    # The runs of a series are one group in W&B, named after their folder.
    assert lines[1].endswith(f"training/train_latent_diffusion.py --config {files[1]} --seed 3 --wandb_group=runs")
    assert run_experiments.main([*files, "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("# finished")


def test_what_is_finished(tmp_path):
    first, second = plan(experiment_files(tmp_path), [])
    assert not is_finished(first)
    leave_behind(first.folder, first.config, exported=False)
    assert not is_finished(first)
    leave_behind(first.folder, first.config)
    leave_behind(second.folder, second.config, steps=30, stopped_early=True)
    assert is_finished(first)
    assert is_finished(second)
    for flags in (["--max_train_steps", "60"], ["--extra_epochs", "1"], ["--overwrite"], ["--seed", "1"]):
        assert not is_finished(plan(experiment_files(tmp_path), flags)[0])
    for flags in (["--max_train_steps", "40"], ["--max_train_steps", "0", "--num_train_epochs", "4"]):
        assert is_finished(plan(experiment_files(tmp_path), flags)[0])
    assert not is_finished(plan(experiment_files(tmp_path), ["--max_train_steps", "0", "--num_train_epochs", "5"])[0])
    for damaged in ("", "{}", '{"steps": "40"}', '{"steps": 40, "num_train_images": 80, "global_batch_size": 0}'):
        first.folder.record_file.write_text(damaged)
        assert not is_finished(first)


def test_a_comparison_lies_beside_its_runs(tmp_path, monkeypatch):
    experiments = plan(experiment_files(tmp_path), [])
    assert common_folder(experiments) == tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    assert common_folder(experiments) == Path("runs")


def test_patterns_that_the_shell_left_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = [experiment.name for experiment in plan([f"{TINY}/*.yaml"], [])]
    assert names == sorted(names)
    assert len(names) == 6


def test_mistakes_are_reported_before_anything_runs(tmp_path):
    files = experiment_files(tmp_path, three="learning_rat: 1.0e-3")
    with pytest.raises(UserError, match=r"three.yaml: unknown key 'learning_rat'.*did you mean 'learning_rate'"):
        plan(files, [])
    with pytest.raises(UserError, match="one.yaml and .*two.yaml have the same output_dir"):
        plan(files[:2], ["--output_dir", str(tmp_path / "same")])
    with pytest.raises(UserError, match="no file 'nothing"):
        plan(["nothing/*.yaml"], [])
    with pytest.raises(UserError, match="unknown flag --learning_rat"):
        plan(files[:1], ["--learning_rat", "1"])
    with pytest.raises(UserError, match="--print_command; did you mean 'print_commands'"):
        parse_arguments([*files, "--print_command"])
    with pytest.raises(UserError, match="--num_samples is 0"):
        parse_arguments([*files, "--num_samples", "0"])
