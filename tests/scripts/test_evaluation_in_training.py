"""Generated images are measured during a run: in metrics.csv, for the best checkpoint, and the same after a resume."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipelines.tools.cli import UserError
from tests.conftest import forget_accelerate
from tests.support.runs import ROOT, assert_same_state, command, environment, launch
from training import train_latent_diffusion
from training.core.exchange import Exchange
from training.core.stage import StageContext
from training.data.source import load_split
from training.engine.best import BestMetric, best_metric, check_evaluations
from training.engine.cadence import Cadence
from training.evaluation.data import RealImages, plain_images
from training.train_autoencoder import AutoencoderStage
from training.train_autoencoder import Config as AutoencoderConfig

SCRIPT = ROOT / "training/train_latent_diffusion.py"
EVALUATION = (
    *("--evaluation_epochs", "1", "--evaluation_images", "8", "--evaluation_inference_steps", "2"),
    *("--evaluation_extractor_resolution", "32", "--num_train_epochs", "2", "--preview_epochs", "0"),
)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("eval_kid")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, diffusion_flags) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    forget_accelerate()
    assert train_latent_diffusion.main([*diffusion_flags, *EVALUATION, "--output_dir", str(folder)]) == 0
    forget_accelerate()
    return folder


def test_metrics_are_logged_and_the_best_checkpoint_is_chosen_by_kid(whole):
    logged = rows(whole)
    assert len(logged) == 2
    assert all(float(row["eval_kid_standard_error"]) > 0 and row["eval_copy_rate"] for row in logged)
    best = min(logged, key=lambda row: float(row["eval_kid"]))
    record = json.loads((whole / "record.json").read_text(encoding="utf-8"))
    assert record["best"] == {
        "metric": "eval_kid", "value": pytest.approx(float(best["eval_kid"]), rel=1e-6), "step": int(best["step"]),
    }  # fmt: skip
    assert record["metrics"]["eval_copy_rate"] == float(logged[-1]["eval_copy_rate"])
    assert "eval_kid" in (whole / "run.log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_run_resumes_to_the_same_run(tmp_path, whole, diffusion_flags, processes):
    run = tmp_path / "run"
    flags = [*diffusion_flags, *EVALUATION, "--output_dir", str(run)]
    if processes == 2:  # 4 images on each of 2 processes instead of 2 micro-batches on one
        flags += ["--gradient_accumulation_steps", "1"]
    process = subprocess.Popen(command(SCRIPT, *flags, processes=processes), env=environment(), cwd=ROOT)
    while not (run / "metrics.csv").is_file() or not rows(run):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert len(rows(run)) == 1
    done = launch(SCRIPT, *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    assert len(rows(run)) == 2
    if processes == 1:
        assert_same_state(run, whole)
    for ours, theirs in zip(rows(run), rows(whole), strict=True):  # sums in another order change the weights slightly
        assert float(ours["eval_kid"]) == pytest.approx(float(theirs["eval_kid"]), rel=0.05)
        assert ours["eval_copy_rate"] == theirs["eval_copy_rate"]


@pytest.mark.slow
def test_a_run_whose_measurements_were_timed_first_is_the_same_run(tmp_path, whole, diffusion_flags):
    forget_accelerate()
    words = [*diffusion_flags, *EVALUATION, "--output_dir", str(tmp_path / "run"), "--max_train_minutes", "30"]
    assert train_latent_diffusion.main(words) == 0
    assert_same_state(tmp_path / "run", whole)
    seconds = json.loads((tmp_path / "run/speed.json").read_text(encoding="utf-8"))["seconds"]
    assert seconds["evaluation"] > 0
    assert seconds["copies"] == 0


def test_images_that_training_keeps_in_memory_are_not_decoded_again(diffusion_flags):
    words = [*diffusion_flags, *EVALUATION, "--output_dir", "unused"]
    config = train_latent_diffusion.parse_config(train_latent_diffusion.Config, words)
    stage = train_latent_diffusion.LatentDiffusionStage(config, StageContext())
    training, held_out = stage._real
    assert training.data._kept is stage.training_set._kept is not None
    assert held_out.data._kept is stage.validation_set._kept
    own = plain_images(load_split(config, "train", config.seed), config)
    expected = RealImages("train", own, config.evaluation_real_images)
    assert training.images(range(4)) == expected.images(range(4))


class Slow(train_latent_diffusion.LatentDiffusionStage):
    """Takes a fifth of a second longer for each image, and counts the images."""

    SECONDS = 0.2

    def _evaluated_images(self, exchange, count):
        self.counts = [*getattr(self, "counts", []), count]
        time.sleep(self.SECONDS * count)
        return super()._evaluated_images(exchange, count)


@pytest.mark.slow
def test_the_time_of_a_measurement_is_estimated_from_a_tenth_of_its_images(diffusion_flags):
    words = [*diffusion_flags, *EVALUATION[:2], "--evaluation_images", "100", *EVALUATION[4:], "--output_dir", "unused"]
    stage = Slow(train_latent_diffusion.parse_config(train_latent_diffusion.Config, words), StageContext())
    estimated = stage.evaluation_seconds(Exchange(), distances=True, copies=True)
    assert stage.counts == [4, 12]  # batches of 4 images
    assert estimated > 100 * stage.SECONDS  # as long as all 100 images take at least, although only 12 were generated


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_length_of_a_run_counts_its_measurements(tmp_path, diffusion_flags, processes):
    cadence = ("--evaluation_steps", "2", "--validation_epochs", "0", "--checkpointing_epochs", "0")
    words = [*diffusion_flags, *EVALUATION, *cadence, "--num_train_epochs", "3000", "--max_train_minutes", "0.5"]
    started = time.monotonic()
    done = launch(SCRIPT, *words, "--output_dir", str(tmp_path / "run"), processes=processes)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run/speed.json").read_text(encoding="utf-8"))
    assert plan["steps"] < plan["all_steps"] / 10
    measurements = plan["seconds"]["evaluation"] * plan["steps"] / 2
    assert 0.1 * plan["estimated_seconds"] < measurements < plan["estimated_seconds"]
    assert seconds < 1.5 * plan["estimated_seconds"] + 15  # starting the processes is not part of the estimate


def test_a_run_that_copies_has_no_best_checkpoint(tmp_path, diffusion_flags):
    """The images of this model are the training images themselves: its sampler returns them."""
    forget_accelerate()
    folder = tmp_path / "run"

    class Copying(train_latent_diffusion.LatentDiffusionStage):
        def _evaluated_images(self, exchange, count):
            return [self._real[0].images([i])[0] for i in range(count)]

    config = train_latent_diffusion.parse_config(
        train_latent_diffusion.Config, [*diffusion_flags, *EVALUATION, "--output_dir", str(folder)]
    )
    assert train_latent_diffusion.train(Copying, config) == 0
    forget_accelerate()
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert record["best"]["value"] is None
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert "8 of 8 generated images are copies of training images" in log
    assert "check_dataset.py" in log


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--best_metric", "auto"), BestMetric("val_psnr", False)),
        (("--best_metric", "val_loss"), BestMetric("val_loss", True)),
        (("--best_metric", "val_ssim"), BestMetric("val_ssim", False)),
    ],
)
def test_which_metric_decides(flags, expected):
    config = train_latent_diffusion.parse_config(AutoencoderConfig, [*flags, "--dataset_name", "x"])
    stage = object.__new__(AutoencoderStage)
    assert best_metric(stage, config, Cadence(config, 4, 8)) == expected


def test_metrics_of_generated_images_need_measurements():
    config = train_latent_diffusion.parse_config(AutoencoderConfig, ["--best_metric", "kid", "--dataset_name", "x"])
    with pytest.raises(UserError, match="this stage generates no images; use auto"):
        best_metric(object.__new__(AutoencoderStage), config, Cadence(config, 4, 8))
    stage = object.__new__(train_latent_diffusion.LatentDiffusionStage)
    with pytest.raises(UserError, match="add --evaluation_epochs 1"):
        best_metric(stage, config, Cadence(config, 4, 8))


def test_a_stage_without_generated_images_refuses_to_measure_some():
    config = train_latent_diffusion.parse_config(AutoencoderConfig, ["--evaluation_epochs", "1", "--dataset_name", "x"])
    with pytest.raises(
        UserError, match=r"--evaluation_epochs: this stage \(autoencoder\) generates no images to measure"
    ):
        check_evaluations(object.__new__(AutoencoderStage), config)


@pytest.mark.parametrize(("metric", "known"), [("val_los", "val_loss"), ("fd", "eval_kid")])
def test_a_metric_that_does_not_exist_ends_the_run_when_it_should_have_been_measured(
    tmp_path, diffusion_flags, metric, known
):
    forget_accelerate()
    words = [*diffusion_flags, *EVALUATION, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=rf"--best_metric {metric}: the measurements of this run are .*{known}"):
        train_latent_diffusion.main([*words, "--best_metric", metric])
    forget_accelerate()
    assert train_latent_diffusion.main([*words, "--best_metric", "auto"]) == 0  # resumes from the saved checkpoint
    forget_accelerate()
    assert len(rows(tmp_path / "run")) == 2
    assert "resumed from" in (tmp_path / "run/run.log").read_text(encoding="utf-8")


def test_an_error_in_one_process_is_raised_in_all_of_them():
    """Two processes in turn: what each sends is given to the other."""
    sent = []

    def fail(numbers):
        raise UserError("row 3 cannot be read")

    first = Exchange(0, 2, lambda value: sent.append(value) or [value, (None, None)])
    with pytest.raises(UserError, match="row 3"):
        first.map(fail, 4, 2)
    second = Exchange(1, 2, lambda value: [sent[0], value])
    with pytest.raises(UserError, match="row 3"):
        second.map(lambda numbers: list(numbers), 4, 2)
    third = Exchange(0, 2, lambda value: [value, ([[2, 3]], None)])  # batches of 2: the first and the third are its own
    assert third.map(lambda numbers: list(numbers), 5, 2) == [0, 1, 2, 3, 4]
