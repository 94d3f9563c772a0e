"""Sweeps and seeds: the runs that they become, and the metrics over the seeds of each setting."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path

import pytest

from pipelines.tools.cli import UserError
from tests.experiments.test_comparison import experiment_files, leave_behind
from training import run_experiments
from training.experiments.comparison import Table, comparison_table, table_markdown
from training.experiments.seeds import Spread, seeds_csv, seeds_markdown, seeds_table
from training.experiments.sweeps import Sweep, parse_sweeps, variants
from training.run_experiments import is_finished, parse_arguments, plan


def planned(folder: Path, *words: str, flags: tuple[str, ...] = (), files: int = 1):
    """Return the experiments of a series of these files and words."""
    options = parse_arguments([*experiment_files(folder)[:files], *words, "--", *flags])
    return plan(options.configs, options.flags, parse_sweeps(options.sweep), options.seeds)


def test_each_combination_and_seed_is_a_run_with_a_folder_of_its_own(tmp_path):
    runs = planned(tmp_path, "--sweep", "learning_rate=1e-4,5e-4", "--sweep", "ema_decay=0.5", "--seeds", "2")
    assert [run.config.output_dir for run in runs] == [
        f"{tmp_path}/runs/one_sweep/learning_rate_{rate}_ema_decay_0.5_seed_{seed}"
        for rate in ("1e-4", "5e-4")
        for seed in (0, 1)
    ]
    assert [(run.config.learning_rate, run.config.seed, run.config.ema_decay) for run in runs] == [
        (1e-4, 0, 0.5), (1e-4, 1, 0.5), (5e-4, 0, 0.5), (5e-4, 1, 0.5),
    ]  # fmt: skip
    assert runs[0].name == "one learning_rate=1e-4, ema_decay=0.5, seed 0"
    assert {run.setting for run in runs} == {f"one learning_rate={rate}, ema_decay=0.5" for rate in ("1e-4", "5e-4")}
    for run in runs:  # the command says all of it
        again = run_experiments.parse_config(type(run.config), run.words[1:])
        assert again == run.config


def test_seeds_begin_with_that_of_the_config(tmp_path):
    runs = planned(tmp_path, "--seeds", "2", flags=("--seed", "7", "--output_dir", f"{tmp_path}/mine"))
    assert [run.config.seed for run in runs] == [7, 8]
    assert [Path(run.config.output_dir) for run in runs] == [tmp_path / f"mine_sweep/seed_{seed}" for seed in (7, 8)]


def test_a_sweep_without_seeds_and_of_several_files(tmp_path):
    runs = planned(tmp_path, "--sweep", "model.block_out_channels=[32,32],[64,64]", files=2)
    assert [run.config.model.block_out_channels for run in runs] == [[32, 32], [64, 64]] * 2
    assert [Path(run.config.output_dir).name for run in runs[:2]] == [
        "model.block_out_channels_32-32", "model.block_out_channels_64-64",
    ]  # fmt: skip
    assert len({run.name for run in runs}) == 4
    assert all(run.setting == "" for run in runs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "learning_rat=1,2"], "one.yaml: unknown flag --learning_rat; did you mean 'learning_rate'"),
        (["--sweep", "learning_rate=fast"], "one.yaml: --learning_rate.*fast"),
        (["--sweep", "learning_rate"], "--sweep learning_rate: write it as OPTION=VALUE,VALUE"),
        (["--sweep", "learning_rate=1,"], "write it as OPTION=VALUE,VALUE"),
        (["--sweep", "learning_rate=1,1"], "a value occurs twice"),
        (["--sweep", "output_dir=a,b"], "output_dir is different for each run already"),
        (["--sweep", "seed=1,2", "--seeds", "2"], "both give the seeds"),
        (["--sweep", "seed=1", "--sweep", "seed=2"], "--sweep gives seed twice"),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--sweep", "vae=a/b,a-b"], "vae=a/b and one vae=a-b have the same output_dir"),
        (["--sweep", f"vae={'x' * 250}"], "would have a name of 254 characters"),
    ],
)
def test_sweeps_that_cannot_be_run(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, *words)


def test_values_keep_their_brackets():
    assert parse_sweeps(["a=[1,2],[3]", "--b={x: 1, y: 2},c"]) == [
        Sweep("a", ("[1,2]", "[3]")), Sweep("b", ("{x: 1, y: 2}", "c")),
    ]  # fmt: skip
    assert len(variants(parse_sweeps(["a=1,2", "b=3,4,5"]), 4)) == 24


def test_a_dry_run_lists_the_runs_and_finished_ones_are_skipped(tmp_path, capsys):
    words = ["--sweep", "learning_rate=1e-4,5e-4", "--seeds", "2"]
    runs = planned(tmp_path, *words)
    leave_behind(runs[1].folder, runs[1].config)
    assert [is_finished(run) for run in runs] == [False, True, False, False]
    assert run_experiments.main([*experiment_files(tmp_path)[:1], *words, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "--learning_rate=1e-4 --seed=1" in lines[1]
    assert [line.endswith("# finished") for line in lines] == [False, True, False, False]


# --- W&B groups ------------------------------------------------------------------------------------------------------


def test_runs_of_one_setting_are_a_group_of_wandb(tmp_path):
    runs = planned(tmp_path, "--sweep", "learning_rate=1e-4,5e-4", "--seeds", "2", flags=("--report_to", "wandb"))
    groups = [run.config.wandb_group for run in runs]
    assert groups == ["one learning_rate=1e-4"] * 2 + ["one learning_rate=5e-4"] * 2
    assert all(f"--wandb_group={run.config.wandb_group}" in run.words for run in runs)
    series = planned(tmp_path, files=2, flags=("--report_to", "wandb"))
    assert [run.config.wandb_group for run in series] == ["runs", "runs"]


def test_a_group_of_the_user_is_kept_and_without_wandb_there_is_none(tmp_path):
    own = planned(tmp_path, "--seeds", "2", flags=("--report_to", "wandb", "--wandb_group", "mine"))
    assert [run.config.wandb_group for run in own] == ["mine", "mine"]
    assert "--wandb_group" not in " ".join(planned(tmp_path, "--seeds", "2", flags=("--report_to", "none"))[0].words)


# --- metrics over seeds ----------------------------------------------------------------------------------------------

LOSSES = {"a, seed 0": 0.5, "a, seed 1": 0.7, "a, seed 2": 0.9, "b, seed 0": 0.25, "b, seed 1": 9.0}


def table() -> tuple[Table, dict[str, str]]:
    rows = [
        {
            "name": name,
            "outcome": "finished",
            "rate": name[0],
            "seed": int(name[-1]),
            "parameters": 1234567,
            "val_loss": loss,
        }
        for name, loss in LOSSES.items()
    ]
    rows[0]["val_psnr"] = 20.0
    rows[4]["outcome"] = "failed with exit status 1"
    columns = ["name", "outcome", "rate", "seed", "parameters", "val_loss", "val_psnr"]
    return Table(columns, rows, ["rate", "seed"]), {name: name[0] for name in LOSSES}


def test_mean_and_sample_standard_deviation_of_finished_runs():
    summary = seeds_table(*table())
    assert summary.columns == ["name", "rate", "n", "parameters", "val_loss", "val_psnr"]
    first, second = summary.rows
    assert (first["name"], first["n"], second["n"]) == ("a", 3, 1)
    assert first["val_loss"] == Spread(pytest.approx(0.7), pytest.approx(statistics.stdev([0.5, 0.7, 0.9])), 3)
    assert first["val_loss"].std == pytest.approx(0.2)  # n − 1: the population's would be 0.163
    assert second["val_loss"] == Spread(0.25, None, 1)
    assert first["val_psnr"] == Spread(20.0, None, 1)


def test_tables_over_seeds_in_both_formats():
    summary = seeds_table(*table())
    text = seeds_markdown(summary)
    assert "| a | a | 3 | 1,234,567 | 0.7 ± 0.2 | 20 (n = 1) |" in text
    assert "| b | b | 1 | 1,234,567 | 0.25 |  |" in text
    assert "sample standard deviation over the n finished runs" in text
    rows = list(csv.DictReader(io.StringIO(seeds_csv(summary))))
    assert float(rows[0]["val_loss_std"]) == pytest.approx(0.2)
    assert (float(rows[0]["val_loss_mean"]), rows[0]["val_loss_n"], rows[1]["val_loss_std"]) == (
        pytest.approx(0.7),
        "3",
        "",
    )
    whole = table_markdown(table()[0], None, text)
    assert whole.index("## Over seeds") < whole.index("± 0.2") < whole.index("## Runs") < whole.index("| a, seed 0 |")


def test_a_series_compares_its_seeds(tmp_path):
    runs = planned(tmp_path, "--sweep", "learning_rate=1e-4,5e-4", "--seeds", "2")
    for run in runs:
        leave_behind(run.folder, run.config)
    found = {run.name: (run.stage, run.folder, run.config) for run in runs}
    compared = comparison_table(found, {run.name: "finished" for run in runs})
    assert compared.differing == ["seed", "learning_rate"] or compared.differing == ["learning_rate", "seed"]
    markdown, text = run_experiments._over_seeds(runs, compared)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["name"], row["learning_rate"], row["n"]) for row in rows] == [
        ("one learning_rate=1e-4", "0.0001", "2"), ("one learning_rate=5e-4", "0.0005", "2"),
    ]  # fmt: skip
    assert (float(rows[0]["best_val_loss_mean"]), float(rows[0]["best_val_loss_std"])) == (0.52, 0.0)
    assert "| one learning_rate=1e-4 | 0.0001 | 2 |" in markdown
