"""training.api: it gives the losses, models and data of the scripts, and the example in docs/api.md runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pipelines.tools.cli import UserError
from pipelines.tools.devices import has_accelerator_device
from tests.conftest import ROOT, forget_accelerate
from tests.support.runs import rows
from training import api, train_autoencoder
from training.core.batches import fetch
from training.core.draws import SampleKey
from training.core.layout import BatchLayout
from training.engine.sampler import StepSampler


@pytest.fixture(autouse=True)
def not_deterministic_for_ever():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def config_file(tmp_path, autoencoder_flags) -> Path:
    """The flags of the tiny autoencoder as a YAML file."""
    file = tmp_path / "autoencoder.yaml"
    pairs = zip(autoencoder_flags[::2], autoencoder_flags[1::2], strict=True)
    lines = [f"{name.removeprefix('--')}: {value}" for name, value in pairs]
    nested = [line.removeprefix("model.") for line in lines if line.startswith("model.")]
    plain = [line for line in lines if not line.startswith("model.")]
    file.write_text("\n".join([*plain, "model:", *(f"  {line}" for line in nested)]))
    return file


def test_the_losses_are_those_of_a_run(tmp_path, config_file, autoencoder_flags):
    """Three steps of a handwritten loop over the API give the losses of the training script."""
    flags = ("--max_train_steps", "3", "--max_grad_norm", "0", "--gradient_accumulation_steps", "1")
    forget_accelerate()
    assert train_autoencoder.main([*autoencoder_flags, *flags, "--output_dir", str(tmp_path / "run")]) == 0
    expected = [float(row["loss"]) for row in rows(tmp_path / "run")]
    forget_accelerate()
    api.set_deterministic(0)
    config = api.load_config(
        config_file, max_train_steps=3, gradient_accumulation_steps=1, output_dir=str(tmp_path / "none")
    )
    model, dataset, loss_of = api.build_model(config), api.build_dataset(config), api.build_loss(config)
    optimizer = api.build_optimizer(config, model)
    sampler = StepSampler(len(dataset), BatchLayout(config.train_batch_size), config.seed)
    losses = []
    for step in range(3):
        loss, metrics = loss_of(fetch(dataset, sampler.keys(step, 0)), step)
        assert "l1" in metrics
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)
    assert not (tmp_path / "none").exists()


def test_one_config_is_one_stage(config_file):
    config = api.load_config(config_file)
    assert api.build_model(config) is api.build_model(config)
    assert api.build_model(api.load_config(config_file)) is not api.build_model(config)
    train, validation = api.build_dataset(config), api.build_dataset(config, "validation")
    assert len(train) == 32
    assert len(validation) == 4
    assert validation[SampleKey(0, 0)]["pixel_values"].shape == (3, 64, 64)
    assert next(api.build_model(config).parameters()).device.type == api.get_device().type
    with pytest.raises(UserError, match="train or validation"):
        api.build_dataset(config, "test")


def test_load_config_takes_a_file_a_run_or_a_stage_by_name(tmp_path, config_file, autoencoder):
    config = api.load_config(config_file, learning_rate=1e-5, **{"model.latent_channels": 8, "train_data_dir": None})
    assert (config.learning_rate, config.model.latent_channels, config.train_data_dir) == (1e-5, 8, None)
    assert type(api.load_config(autoencoder)) is type(config)
    (tmp_path / "mine.yaml").write_text("learning_rate: 1.0e-3\n")
    assert type(api.load_config(tmp_path / "mine.yaml", stage="autoencoder")) is type(config)
    with pytest.raises(UserError, match="could belong to"):
        api.load_config(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match="learning_rate"):
        api.load_config(config_file, learning_rat=1)
    with pytest.raises(UserError, match="must be above 0"):
        api.load_config(config_file, learning_rate=-1)


def test_frozen_parameters_get_no_optimizer(config_file):
    config = api.load_config(config_file, freeze_parameters=["vae.encoder.*"])
    model = api.build_model(config)
    given = {id(p) for group in api.build_optimizer(config, model).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in given) == (".encoder." not in name)


def test_set_deterministic_repeats_what_is_drawn():
    api.set_deterministic(5)
    first = torch.rand(3)
    api.set_deterministic(5)
    assert torch.equal(torch.rand(3), first)
    assert torch.are_deterministic_algorithms_enabled()


def test_the_device_is_the_one_runs_are_on(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not has_accelerator_device()
    assert api.get_device() == torch.device("cpu")


def test_the_documented_example_runs(tmp_path, posters, monkeypatch, capsys):
    """It runs on forty posters; the config in the guide would draw 2,000."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/posters_64").symlink_to(posters)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(example, "docs/api.md", "exec"), {})
    printed = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert len(printed) == 20
    assert printed[-1] < printed[0]


def test_all_names_are_documented():
    text = (ROOT / "docs/api.md").read_text()
    assert [name for name in api.__all__ if f"`{name}" not in text] == []
