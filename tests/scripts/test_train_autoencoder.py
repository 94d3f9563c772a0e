"""train_autoencoder.py as users start it: finished, loaded elsewhere, resumed; and every part of it trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.support.runs import ROOT, assert_same_state, launch, rows, sigterm_in_step, tensors
from training import train_autoencoder
from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.data.images import ImageDataset, load_split
from training.objectives.perceptual import PerceptualLoss
from training.run.checkpoint import load_tensors

SCRIPT = ROOT / "training/train_autoencoder.py"


def train(folder: Path, flags, *more: str) -> int:
    forget_accelerate()
    return train_autoencoder.main([*flags, "--output_dir", str(folder), "--num_train_epochs", "1", *more])


def config_of(flags, *more: str) -> train_autoencoder.Config:
    return parse_config(train_autoencoder.Config, [*flags, *more])


def reconstructed(pipeline, images) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(images, output_type="np").images


@pytest.fixture(scope="module")
def launched(tmp_path_factory, autoencoder_flags) -> Path:
    """`python training/train_autoencoder.py …`, from another folder."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    flags = (*autoencoder_flags, "--output_dir", str(folder), "--num_train_epochs", "2")
    done = launch(SCRIPT, *flags, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder


def test_the_run_folder_is_complete(launched):
    files = {"config.yaml", "metrics.csv", "training_curves.png", "run.log", "record.json"}
    assert {p.name for p in launched.iterdir()} >= files | {"samples", "checkpoints", "pipeline"}
    samples = {"epoch_0001.png", "epoch_0002.png", "progress.png"}
    assert {p.name for p in (launched / "samples").iterdir()} == samples
    with Image.open(launched / "pipeline/samples.png") as image:
        assert image.size > (64, 64)
    last = rows(launched)[-1]
    assert {"loss", "l1", "kl", "val_loss", "val_psnr", "val_ssim"} <= {name for name, value in last.items() if value}
    assert f"{float(last['val_psnr']):.1f}"[:3] in (launched / "pipeline/README.md").read_text()


def test_the_pipeline_loads_here_and_as_remote_code_alike(launched, posters):
    images = [row["image"] for row in load_split(config_of(["--dataset_name", str(posters)]), "validation", 0)]
    ours = reconstructed(load_pipeline(launched), images)
    theirs = reconstructed(DiffusionPipeline.from_pretrained(launched / "pipeline", trust_remote_code=True), images)
    assert ours.shape == (4, 64, 64, 3)
    assert np.array_equal(ours, theirs)
    module = type(DiffusionPipeline.from_pretrained(launched / "pipeline", trust_remote_code=True)).__module__
    assert module.startswith("diffusers_modules")


def test_latents_have_the_statistics_in_the_config_of_the_model(launched, autoencoder_flags):
    vae = load_pipeline(launched).vae
    config = config_of(autoencoder_flags)
    data = ImageDataset(load_split(config, "train", 0), config, captions=False, augment=False)
    from pipelines.common.latents import encode_latents

    with torch.no_grad():
        latents = encode_latents(vae, fetch(data, [SampleKey(i, 0) for i in range(len(data))])["pixel_values"])
    assert latents.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=1e-4)
    assert latents.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 4, abs=1e-3)


def test_interrupted_in_mid_epoch_and_resumed(tmp_path, launched, autoencoder_flags, monkeypatch):
    """Gradients accumulate over two micro-batches; a SIGTERM arrives in the second step of the second epoch."""
    with sigterm_in_step(5, train_autoencoder.AutoencoderPhase, monkeypatch):
        assert train(tmp_path / "run", autoencoder_flags, "--num_train_epochs", "2") == 75
    assert json.loads((tmp_path / "run/checkpoints/latest/trainer_state.json").read_text())["step"] in (6, 7)
    assert train(tmp_path / "run", autoencoder_flags, "--num_train_epochs", "2") == 0
    assert_same_state(tmp_path / "run", launched)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A tiny ResNet, saved as Transformers saves one."""
    from transformers import ResNetBackbone, ResNetConfig

    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetBackbone(ResNetConfig(**sizes, out_features=["stage1", "stage2"])).save_pretrained(folder)
    return folder


def test_with_discriminator_and_perceptual_loss_every_part_trains_and_the_rest_stays(
    tmp_path, autoencoder_flags, backbone
):
    flags = ("--adversarial_weight", "0.1", "--discriminator_start", "2", "--perceptual_weight", "0.5")
    more = (*flags, "--perceptual_backbone", str(backbone), "--checkpointing_steps", "1")
    train(tmp_path / "run", autoencoder_flags, *more, "--checkpoints_total_limit", "9")
    first, second, last = (tmp_path / f"run/checkpoints/step-{step:08d}" for step in (1, 2, 4))
    names = ("phase_autoencoder.safetensors", "phase_discriminator.safetensors")
    before = {name: load_tensors(first / name) for name in names}
    after = {name: load_tensors(last / name) for name in names}
    for name in names:
        assert [k for k in before[name] if torch.equal(before[name][k], after[name][k])] == [], name
    until = load_tensors(second / names[1])
    assert all(torch.equal(before[names[1]][k], until[k]) for k in until), "the discriminator starts with its step"
    assert not any("perceptual" in key or "backbone" in key for key in tensors(tmp_path / "run"))
    logged = rows(tmp_path / "run")
    assert [bool(row["adversarial"]) for row in logged] == [False, False, True, True]
    assert all(float(row["perceptual"]) > 0 for row in logged)


def test_the_generators_loss_gives_the_discriminator_no_gradient(autoencoder_flags):
    config = config_of(autoencoder_flags, "--adversarial_weight", "1", "--discriminator_start", "0")
    stage = train_autoencoder.AutoencoderStage(config, StageContext())
    generator, discriminator = stage.phases
    batch = fetch(stage.train_data(), [SampleKey(0, 0), SampleKey(1, 1)])
    generator(batch, Draws(0, 0, range(2)))[0].backward()
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.requires_grad for p in discriminator.parameters())
    with_critic = [p.grad.clone() for p in generator.parameters()]
    generator.zero_grad()
    config.adversarial_weight = 0.0
    generator(batch, Draws(0, 0, range(2)))[0].backward()
    assert any(not torch.allclose(g, p.grad) for g, p in zip(with_critic, generator.parameters(), strict=True))
    generator.zero_grad()
    discriminator(batch, Draws(0, 0, range(2)))[0].backward()
    assert all(p.grad is None for p in generator.parameters())
    # Weights only: within the margin of the hinge loss, the last bias gets -1 from real and +1 from fake images.
    assert all(p.grad is not None and p.grad.any() for p in discriminator.parameters() if p.ndim > 1)


def test_the_perceptual_loss_has_a_gradient_and_is_zero_at_the_reference(backbone):
    loss = PerceptualLoss(str(backbone)).eval().requires_grad_(False)
    references = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = (references + 0.1).requires_grad_()
    value = loss(images, references)
    value.backward()
    assert value > 0
    assert images.grad is not None
    assert images.grad.flatten(1).norm(dim=1).min() > 0
    assert loss(references, references).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("class_name", ["AutoencoderKL", "AutoencoderTiny"])
def test_stock_classes_train(tmp_path, autoencoder_flags, class_name):
    model = ("--model.class_name", class_name, "--model.patch_size", "1", "--model.block_out_channels", "[8,8,8,8]")
    flags = (*model, "--max_train_steps", "2", "--gradient_accumulation_steps", "1", "--checkpointing_steps", "1")
    train(tmp_path / "run", autoencoder_flags, *flags, "--checkpoints_total_limit", "9", "--preview_epochs", "0")
    one, two = (load_tensors(tmp_path / f"run/checkpoints/step-{s:08d}/phase_autoencoder.safetensors") for s in (1, 2))
    still = [name for name in one if torch.equal(one[name], two[name])]
    assert still == []
    vae = DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline", trust_remote_code=True).vae
    assert type(vae).__name__ == class_name
    assert type(vae).__module__.startswith("diffusers.")


@pytest.mark.slow
def test_started_by_accelerate_launch(tmp_path, autoencoder_flags):
    import subprocess

    from tests.support.runs import environment

    launcher = str(Path(sys.executable).with_name("accelerate"))
    config = str(ROOT / "configs/accelerate/cpu.yaml")
    flags = (*autoencoder_flags, "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "1")
    done = subprocess.run(
        [launcher, "launch", "--config_file", config, str(SCRIPT), *flags],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/pipeline/model_index.json").is_file()
    assert len(rows(tmp_path / "run")) == 4
