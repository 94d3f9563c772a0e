"""Fitting a run to a time: what is measured, what is decided from it, and that measuring leaves no trace."""

from __future__ import annotations

import json
import os

import pytest

from tests.support.runs import tensors, toy
from tests.support.toy import ToyConfig, ToyStage
from tests.support.toy_runs import assert_equal, run, state_of
from training.engine.launch import start_accelerator
from training.engine.speed import MIN_STEPS, SPEED_FILE, Speed
from training.engine.training import Training

SHORT = ("--validation_epochs", "0", "--preview_epochs", "0", "--checkpointing_epochs", "0", "--train_batch_size", "4")


def toy_training(**settings) -> tuple[Training, ToyConfig]:
    config = ToyConfig(train_batch_size=4, **settings)
    return Training(ToyStage(config), config, start_accelerator(config)), config


def test_the_estimate_adds_what_each_part_of_a_run_takes():
    training, config = toy_training(
        critic=True, num_samples=40, validation_epochs=2, preview_steps=15, preview_epochs=0, checkpointing_epochs=5
    )
    speed = Speed(startup=10.0, phases={"denoiser": 1.0, "critic": 0.5}, validation=2.0, previews=3.0, checkpoint=4.0)
    # 65 steps of 10 an epoch. The critic begins at step 2. Validations after 20, 40, 60 and 65. Previews after 15, 30,
    # 45, 60 and 65. Checkpoints after 50 and 65; before each of them, the best one so far may be written.
    rest = 10 + 65 + 0.5 * 63 + 2 * 4 + 3 * 5 + 4
    assert speed.seconds(65, training, config) == rest + 4 * (2 + 2)
    # By time alone, there would be 8 checkpoints in its 2.1 minutes.
    config.checkpointing_minutes = 0.25
    assert speed.seconds(65, training, config) == rest + 4 * 8
    # Without checkpoints by time or steps, the checkpoint after a validation that is the best so far is not deferred.
    config.checkpointing_minutes, config.checkpointing_epochs = 0.0, None
    assert speed.seconds(65, training, config) == rest + 4 * 4


def test_the_estimate_adds_measurements_of_generated_images():
    training, config = toy_training(
        num_samples=40, validation_epochs=0, preview_epochs=0, checkpointing_epochs=0, evaluation_epochs=2,
        memorization_epochs=1, checkpointing_minutes=0.0,
    )  # fmt: skip
    speed = Speed(10.0, {"denoiser": 1.0}, 2.0, 3.0, 4.0, evaluation=100.0, copies=1000.0)
    # 45 steps of 10 an epoch. Measurements after 20, 40 and 45; after 10 and 30, copies alone are searched for. The
    # toy generates no images, so its validation decides, once at the end, as do its previews and its checkpoint.
    assert speed.seconds(45, training, config) == 10 + 45 + 2 + 3 + 4 + 4 + 100 * 3 + 1000 * 2


@pytest.mark.parametrize("seconds", [0.0, 61.0, 100.0, 1e6])
def test_the_longest_run_that_fits_is_chosen(seconds):
    training, config = toy_training(num_samples=40, validation_epochs=1)
    speed = Speed(startup=1.0, phases={"denoiser": 0.5}, validation=2.0, previews=1.0, checkpoint=0.25)
    steps = speed.steps_in(seconds, 700, training, config)
    assert MIN_STEPS <= steps <= 700
    assert steps == MIN_STEPS or speed.seconds(steps, training, config) <= seconds
    assert steps == 700 or speed.seconds(steps + 1, training, config) > seconds


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--critic", "true")])
def test_a_run_that_was_timed_first_gives_the_same_weights(tmp_path, more):
    flags = (*SHORT, *more, "--max_train_steps", "6")
    run(tmp_path / "plain", *flags)
    run(tmp_path / "timed", *flags, "--max_train_minutes", "30")
    assert_equal(tensors(tmp_path / "plain"), tensors(tmp_path / "timed"))
    assert sorted(os.listdir(tmp_path / "timed" / "checkpoints")) == ["best", "latest", "step-00000006"]


@pytest.mark.slow
def test_too_short_a_time_trains_fewer_steps(tmp_path, capsys):
    flags = (*SHORT, "--max_train_steps", "5000", "--max_train_minutes", "0.01")
    run(tmp_path, *flags)
    plan = json.loads((tmp_path / SPEED_FILE).read_text())
    assert (plan["steps"], plan["all_steps"]) == (MIN_STEPS, 5000)
    assert plan["all_steps_estimated_seconds"] > plan["estimated_seconds"] > 0
    assert f"the run trains {MIN_STEPS} steps" in capsys.readouterr().out
    run(tmp_path, *flags)
    assert "complete" in capsys.readouterr().out
    run(tmp_path, *SHORT, "--max_train_steps", "52")
    assert state_of(tmp_path)["step"] == 52


@pytest.mark.slow
def test_a_resumed_run_decides_from_what_was_measured_first(tmp_path):
    run(tmp_path, *SHORT, "--max_train_steps", "4", "--max_train_minutes", "30")
    plan = json.loads((tmp_path / SPEED_FILE).read_text())
    run(tmp_path, *SHORT, "--max_train_steps", "5000", "--max_train_minutes", "0.01")
    resumed = json.loads((tmp_path / SPEED_FILE).read_text())
    assert resumed["seconds"] == plan["seconds"]
    assert state_of(tmp_path)["step"] == resumed["steps"] == MIN_STEPS


@pytest.mark.slow
def test_a_file_of_an_earlier_version_without_measurements_of_images_is_kept(tmp_path):
    run(tmp_path, *SHORT, "--max_train_steps", "4", "--max_train_minutes", "30")
    plan = json.loads((tmp_path / SPEED_FILE).read_text())
    plan["seconds"] = {name: plan["seconds"][name] for name in ("startup", "phases", "validation", "previews")}
    plan["seconds"] |= {"startup": 0.25, "checkpoint": 0.5}
    (tmp_path / SPEED_FILE).write_text(json.dumps(plan))
    run(tmp_path, *SHORT, "--max_train_steps", "5", "--max_train_minutes", "30")
    resumed = json.loads((tmp_path / SPEED_FILE).read_text())
    assert resumed["seconds"] == {**plan["seconds"], "evaluation": 0.0, "copies": 0.0}
    assert "damaged" not in (tmp_path / "run.log").read_text()


@pytest.mark.slow
def test_a_stop_while_measuring_leaves_nothing_behind(tmp_path):
    """The toy asks itself to stop in step 2 of a session, and the steps that are timed come first."""
    flags = (*SHORT, "--max_train_steps", "6", "--max_train_minutes", "30")
    assert run(tmp_path / "stopped", *flags, "--signal_step", "2") == 75
    assert not (tmp_path / "stopped" / SPEED_FILE).exists()
    assert os.listdir(tmp_path / "stopped" / "checkpoints") == []
    run(tmp_path / "stopped", *flags)
    run(tmp_path / "plain", *SHORT, "--max_train_steps", "6")
    assert_equal(tensors(tmp_path / "plain"), tensors(tmp_path / "stopped"))


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    flags = (*SHORT, "--max_train_steps", "5000", "--max_train_minutes", "0.01")
    toy(tmp_path / "two", *flags, processes=2)
    assert json.loads((tmp_path / "two" / "record.json").read_text())["steps"] == MIN_STEPS
    toy(tmp_path / "plain", *SHORT, "--max_train_steps", str(MIN_STEPS), processes=2)
    assert_equal(tensors(tmp_path / "plain"), tensors(tmp_path / "two"))
