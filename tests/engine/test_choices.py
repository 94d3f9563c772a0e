"""Settings that the user leaves to the program, and what is said about settings that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.support.runs import assert_same_state
from tests.support.toy import ToyConfig, ToyData
from tests.support.toy_runs import EVERY_STEP, run
from training.data.images import ImageDataset
from training.data.latent_cache.dataset import LatentCacheDataset
from training.engine.launch import automatic_precision
from training.engine.loading import MOST_WORKERS, automatic_workers
from training.engine.run_config import RunConfig
from training.stages.image_stage import ImageStageConfig
from training.train_controlnet import Config as ControlNetConfig


def settings(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


def log(folder: Path) -> str:
    return (folder / "run.log").read_text()


def test_the_precision_that_was_chosen_is_saved(tmp_path):
    assert run(tmp_path, "--max_train_steps", "1") == 0
    assert settings(tmp_path)["mixed_precision"] == automatic_precision(RunConfig())


@pytest.mark.parametrize("launched", ["fp16", "bf16"])
def test_the_precision_of_the_accelerate_config_is_used(monkeypatch, launched):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert automatic_precision(RunConfig()) == launched


def test_the_no_that_the_launcher_always_sets_is_not_a_choice(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    without = automatic_precision(RunConfig())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert automatic_precision(RunConfig()) == without


def test_a_resumed_run_keeps_its_precision_and_says_so_on_another_device(tmp_path):
    """A run in the precision that this device would not choose is what a run from another device looks like."""
    usual = automatic_precision(RunConfig())
    other = "no" if usual == "bf16" else "bf16"
    flags = ("--max_train_steps", "4", *EVERY_STEP)
    run(tmp_path / "whole", *flags, "--mixed_precision", other)
    assert run(tmp_path / "run", *flags, "--mixed_precision", other, "--signal_step", "2") == 75
    assert run(tmp_path / "run", *flags) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    assert settings(tmp_path / "run")["mixed_precision"] == other
    assert f"keeps --mixed_precision {other}, with which it was started" in log(tmp_path / "run")
    assert f"add --mixed_precision {usual}" in log(tmp_path / "run")


def test_a_precision_given_by_hand_replaces_that_of_the_run(tmp_path):
    run(tmp_path, "--max_train_steps", "1", "--mixed_precision", "bf16")
    run(tmp_path, "--max_train_steps", "2", "--mixed_precision", "no")
    assert settings(tmp_path)["mixed_precision"] == "no"
    assert "changed settings: --mixed_precision: bf16 → no" in log(tmp_path)
    assert "keeps" not in log(tmp_path)


def test_a_new_run_in_place_of_an_old_one_chooses_again(tmp_path):
    run(tmp_path / "run", "--max_train_steps", "1", "--mixed_precision", "bf16", "--validation_steps", "3")
    run(tmp_path / "run", "--max_train_steps", "1", "--overwrite", "true")
    assert settings(tmp_path / "run")["mixed_precision"] == automatic_precision(RunConfig())
    assert settings(tmp_path / "run")["validation_steps"] is None


def test_loader_processes_are_for_images_beside_a_gpu():
    images, latents = ImageDataset.__new__(ImageDataset), LatentCacheDataset.__new__(LatentCacheDataset)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert automatic_workers(images, gpu, 16) == MOST_WORKERS
    assert automatic_workers(images, gpu, 3) == 2
    assert automatic_workers(images, gpu, 1) == 0
    assert automatic_workers(images, cpu, 16) == 0
    assert automatic_workers(latents, gpu, 16) == 0
    assert automatic_workers(ToyData(ToyConfig(), 4, augment=False), gpu, 16) == 0


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert automatic_workers(ImageDataset.__new__(ImageDataset), torch.device("cuda"), 16) == 1


def test_a_short_run_is_said_to_be_short_once(tmp_path):
    run(tmp_path, "--max_train_steps", "4", "--signal_step", "2")
    assert "this run has 4 steps (0.667 epochs of 6); from random weights" in log(tmp_path)
    run(tmp_path, "--max_train_steps", "4")
    assert log(tmp_path).count("from random weights") == 1


@pytest.mark.parametrize("flags", [("--max_train_minutes", "0.01"), ("--max_train_steps", "2000")])
def test_nothing_is_said_about_the_length_where_it_is_known_or_long_enough(tmp_path, flags):
    words = ("--max_train_steps", "60", "--signal_step", "2", *flags)
    assert run(tmp_path, *words, "--validation_epochs", "0") in (0, 75)
    assert "random weights" not in (log(tmp_path) if (tmp_path / "run.log").exists() else "")


def test_which_runs_start_with_trained_weights():
    assert not RunConfig().starts_trained
    assert not ImageStageConfig().starts_trained
    assert ImageStageConfig(init_from="runs/a").starts_trained
    assert ControlNetConfig().starts_trained


def test_a_warmup_that_is_cut_is_said_only_if_it_was_given(tmp_path):
    run(tmp_path / "given", "--max_train_steps", "20", "--lr_warmup_steps", "5")
    assert "--lr_warmup_steps 5 is more than 5% of the 20 steps of phase 'denoiser'" in log(tmp_path / "given")
    run(tmp_path / "default", "--max_train_steps", "20")
    assert "lr_warmup_steps" not in log(tmp_path / "default")
    run(tmp_path / "none", "--max_train_steps", "20", "--lr_warmup_steps", "5", "--lr_scheduler", "constant")
    assert "lr_warmup_steps" not in log(tmp_path / "none")


def test_frequent_events_are_counted_at_the_start(tmp_path):
    run(tmp_path, "--num_train_epochs", "9", "--preview_steps", "1", "--signal_step", "2")
    assert "--preview_steps 1 is due 54 times in this run of 54 steps" in log(tmp_path)
