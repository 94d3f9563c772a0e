"""Which jobs experiments become: what they share, what they wait for, and what is already there."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml

from pipelines.tools.cli import UserError
from tests.conftest import ROOT
from tests.support.toy_runs import EVERY_STEP, cut_after, run_of
from training.hpc import make_inputs, submit
from training.hpc.jobs import Waiting
from training.hpc.planning import jobs_of_experiments
from training.hpc.sites import Site
from training.hpc.status import progress_of, status_table
from training.hpc.submissions import RECORD, Submitted, read_submitted, waiting_for
from training.run.folder import RunFolder
from training.run_experiments import plan

ABLATION = "configs/experiments/latent_diffusion/ablation"
INPUTS = ["data/ablation/posters", "data/ablation/tokenizer", "runs/ablation/autoencoder/pipeline",
          "data/ablation/latents/cache.json"]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jobs_of(*patterns: str, waits_for: tuple[Waiting, ...] = ()):
    experiments = plan([f"{ABLATION}/{pattern}.yaml" for pattern in patterns], [])
    return jobs_of_experiments(experiments, "series", Site(gpus_per_node=4, nodes=2), waits_for)


def test_shared_inputs_are_one_job_of_one_process():
    inputs, series = jobs_of("capacity_*", waits_for=(Waiting("7"),))
    assert (inputs.name, series.name) == ("series-inputs", "series")
    assert inputs.tasks[0].words[1:5] == INPUTS
    assert (inputs.site.nodes, inputs.site.processes, inputs.waits_for) == (1, 1, [Waiting("7")])
    assert (series.site.nodes, series.site.processes) == (2, 4)
    assert series.waits_for == [Waiting("series-inputs")]
    assert [task.name for task in series.tasks][:2] == ["capacity_unet128_d2", "capacity_unet128_d3"]
    assert series.tasks[0].run == "runs/ablation/capacity_unet128_d2"


def test_an_input_of_one_experiment_is_left_to_its_own_job():
    assert [job.name for job in jobs_of("capacity_unet64_d3")] == ["series"]


def test_an_experiment_waits_for_the_task_that_makes_its_input():
    jobs = jobs_of("capacity_unet64_d2", "capacity_unet64_d3", "stage2_*", "stage3_*")
    assert [(job.name, len(job.tasks), job.waits_for) for job in jobs] == [
        ("series-inputs", 1, []),
        ("series-1", 2, [Waiting("series-inputs")]),
        ("series-2", 3, [Waiting("series-1", 2)]),
        ("series", 1, [Waiting("series-2", 1)]),
    ]
    assert jobs[0].tasks[0].words[1:5] == INPUTS, "the run of an experiment is not an input that is made before"


def test_inputs_that_need_the_result_of_an_experiment_are_left_to_those_that_come_after(elsewhere):
    """Both others need the latents of an autoencoder that is itself an experiment of the series."""
    (elsewhere / "latent_diffusion").mkdir()
    base = yaml.safe_load((ROOT / ABLATION / "capacity_unet64_d3.yaml").read_text())
    for name in ("one", "two"):
        text = yaml.safe_dump({**base, "output_dir": f"runs/{name}"}, sort_keys=False)
        (elsewhere / f"latent_diffusion/{name}.yaml").write_text(text)
    files = [f"{ABLATION}/inputs/autoencoder.yaml", "latent_diffusion/one.yaml", "latent_diffusion/two.yaml"]
    (elsewhere / "autoencoder").mkdir()
    (elsewhere / "autoencoder/first.yaml").write_text((ROOT / files[0]).read_text())
    jobs = jobs_of_experiments(plan(["autoencoder/first.yaml", *files[1:]], []), "series", Site(), ())
    assert jobs[0].tasks[0].words[1:4] == [*INPUTS[:2], "--configs"]
    assert [(job.name, [task.name for task in job.tasks], job.waits_for) for job in jobs[1:]] == [
        ("series-1", ["first"], [Waiting("series-inputs")]),
        ("series", ["one", "two"], [Waiting("series-1")]),
    ]


def test_make_inputs_makes_what_is_missing_and_leaves_the_rest(elsewhere, capfd):
    recipe = "data_scripts/make_posters.py --output_dir data/posters --num_posters 12 --num_workers 1"
    (elsewhere / "autoencoder").mkdir()
    settings = {"dataset_name": "data/posters", "output_dir": "runs/x", "prepare": {"data/posters": recipe}}
    (elsewhere / "autoencoder/x.yaml").write_text(yaml.safe_dump(settings))
    words = ["data/posters", "--configs", "autoencoder/x.yaml"]
    assert make_inputs.main(words) == 0
    made = {file: file.stat().st_mtime_ns for file in (elsewhere / "data/posters").rglob("*")}
    assert len(made) > 2
    assert make_inputs.main(words) == 0
    assert made == {file: file.stat().st_mtime_ns for file in (elsewhere / "data/posters").rglob("*")}
    with pytest.raises(UserError, match="no config has data/poster in `prepare`; did you mean 'data/posters'"):
        make_inputs.main(["data/poster", *words[1:]])


def listed(folder: Path, *tasks: Submitted) -> None:
    folder.mkdir()
    (folder / RECORD).write_text("".join(json.dumps(vars(task)) + "\n" for task in tasks) + '{"submission": "half')


def test_names_of_earlier_submissions_become_ids(elsewhere):
    one = Submitted("sweep", "5", "sweep-1", 1, "a", "runs/a", "slurm", 100.0)
    listed(
        elsewhere / "logs", one, Submitted(**{**vars(one), "job": "8", "at": 200.0}),
        Submitted(**{**vars(one), "job": "9", "name": "sweep", "at": 200.0}),
    )  # fmt: skip
    assert len(read_submitted("logs")) == 3, "half a line is left out"
    assert waiting_for(["sweep", "77"], "logs") == [Waiting("8"), Waiting("9"), Waiting("77")]
    with pytest.raises(UserError, match="no job of this name was submitted from here; did you mean 'sweep'"):
        waiting_for(["swep"], "logs")


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory, EVERY_STEP)


def test_the_status_has_the_step_and_the_loss_of_each_run(elsewhere, complete, capsys):
    """Without a scheduler, the run folders alone say how far their runs are."""
    cut = Path(shutil.copytree(complete, elsewhere / "cut", symlinks=True))
    cut_after(cut, 3)
    rows = (cut / "metrics.csv").read_text().splitlines(keepends=True)
    (cut / "metrics.csv").write_text("".join(rows[:4]))
    (cut / "record.json").unlink()
    with (complete / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert progress_of(RunFolder(complete)).loss == losses[-1]
    kinds = {"a": str(complete), "b": str(cut), "c": str(elsewhere / "none"), "d": ""}
    tasks = [
        Submitted("sweep", "999999", "sweep", number, name, run, "slurm", 0.0)
        for number, (name, run) in enumerate(kinds.items(), 1)
    ]
    table = [line.split() for line in status_table(tasks).splitlines()]
    assert table[0] == ["experiment", "job", "state", "step", "of", "loss", "run"]
    assert table[1] == ["a", "999999_1", "complete", "6", "6", f"{losses[-1]:.5g}", str(complete)]
    assert table[2][:5] == ["b", "999999_2", "incomplete", "3", "6"]
    assert table[3] == ["c", "999999_3", "incomplete", str(elsewhere / "none")]
    assert table[4] == ["d", "999999_4", "ended"]
    listed(elsewhere / "logs", *tasks)
    assert submit.main(["--status", "sweep", "--log_dir", "logs"]) == 0
    assert capsys.readouterr().out.count("\n") == 5
