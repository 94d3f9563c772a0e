"""train_latent_diffusion.py as users start it: which parameters train for each kind of condition, and resuming."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from data_scripts import precompute_latents
from pipelines.latent_diffusion import tokenize_captions
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.support.runs import ROOT, assert_same_state, launch, rows, tensors
from tests.support.tiny_models import tiny_text_encoder, tiny_tokenizer
from training import train_latent_diffusion
from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.models.conditioning import caption_and_class
from training.run.checkpoint import load_tensors

SCRIPT = ROOT / "training/train_latent_diffusion.py"
PROMPT = "a minimalist poster, blue on cream, one picture"


def train(folder: Path, flags, *more: str) -> int:
    forget_accelerate()
    return train_latent_diffusion.main([*flags, "--output_dir", str(folder), "--num_train_epochs", "1", *more])


def stage_of(flags, *more: str) -> train_latent_diffusion.LatentDiffusionStage:
    return train_latent_diffusion.LatentDiffusionStage(
        parse_config(train_latent_diffusion.Config, [*flags, *more]), StageContext()
    )


def generate(pipeline, **arguments) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(num_inference_steps=3, generator=generator, output_type="np", **arguments).images


@pytest.fixture(scope="module")
def launched(tmp_path_factory, diffusion_flags) -> Path:
    """`python training/train_latent_diffusion.py …`, from another folder."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    done = launch(SCRIPT, *diffusion_flags, "--output_dir", str(folder), "--num_train_epochs", "2", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory, posters, autoencoder) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "latents"
    forget_accelerate()
    data = ("--dataset_name", str(posters), "--resolution", "64", "--vae", str(autoencoder))
    assert not precompute_latents.main([*data, "--output_dir", str(folder)])
    return folder


def test_the_run_folder_is_complete(launched):
    files = {"config.yaml", "metrics.csv", "training_curves.png", "run.log", "record.json"}
    assert {p.name for p in launched.iterdir()} >= files | {"samples", "checkpoints", "pipeline"}
    samples = {"epoch_0001.png", "epoch_0002.png", "progress.png"}
    assert {p.name for p in (launched / "samples").iterdir()} == samples
    assert (launched / "pipeline/README.md").is_file()
    assert rows(launched)[-1]["val_loss"]


def test_the_pipeline_draws_here_and_as_remote_code_alike(launched):
    ours = generate(load_pipeline(launched), prompt=PROMPT)
    theirs = generate(DiffusionPipeline.from_pretrained(launched / "pipeline", trust_remote_code=True), prompt=PROMPT)
    assert ours.shape == (1, 64, 64, 3)
    assert np.array_equal(ours, theirs)
    other = generate(load_pipeline(launched), prompt="a swiss poster, red on white, no pictures", guidance_scale=5.0)
    assert not np.array_equal(ours, other)


def test_the_pipeline_and_a_checkpoint_have_the_ema_weights(launched):
    ema = load_tensors(launched / "checkpoints/latest/ema.safetensors")
    for folder in (launched / "pipeline", launched / "checkpoints/latest/pipeline"):
        unet = load_tensors(folder / "unet/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tensor, ema[f"unet.{name}"]) for name, tensor in unet.items())


@contextmanager
def terminated(step: int) -> Iterator[None]:
    """Send SIGTERM to this process when a run in this context computes the step."""
    forward = train_latent_diffusion.LatentDiffusionPhase.forward

    def signalled(self, batch, draws):
        if draws.step == step:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, batch, draws)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_latent_diffusion.LatentDiffusionPhase, "forward", signalled)
        yield


def test_interrupted_in_mid_epoch_and_resumed(tmp_path, launched, diffusion_flags):
    """Gradients accumulate over two micro-batches; a SIGTERM arrives in the second step of the second epoch."""
    with terminated(5):
        assert train(tmp_path / "run", diffusion_flags, "--num_train_epochs", "2") == 75
    assert json.loads((tmp_path / "run/checkpoints/latest/trainer_state.json").read_text())["step"] in (6, 7)
    assert train(tmp_path / "run", diffusion_flags, "--num_train_epochs", "2") == 0
    assert_same_state(tmp_path / "run", launched)


def test_a_run_with_candidates_of_noise_resumes_exactly(tmp_path, diffusion_flags):
    flags = (*diffusion_flags, "--noise_candidates", "4", "--preview_epochs", "0")
    assert train(tmp_path / "whole", flags) == 0
    with terminated(1):
        assert train(tmp_path / "run", flags) == 75
    assert train(tmp_path / "run", flags) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_candidates_of_noise_change_training_and_not_validation(diffusion_flags):
    one, four = (stage_of(diffusion_flags, "--noise_candidates", number) for number in ("1", "4"))
    batch, draws = fetch(one.train_data(), [SampleKey(i, i) for i in range(8)]), Draws(0, 0, range(8))
    with torch.no_grad():
        (loss, _), (chosen, _) = (stage.phase(batch, draws) for stage in (one, four))
        sums, same = (stage.validation_step(batch, draws) for stage in (one, four))
    assert chosen < loss  # the target of flow matching is the difference of noise and sample
    assert all(torch.equal(sums[name], same[name]) for name in sums)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A tiny CLIP text encoder with its tokenizer, as a folder of Transformers."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_text_encoder().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


CONDITIONS = {
    "caption, encoder trained jointly": ("--condition_on", "[caption]"),
    "caption, encoder frozen": ("--condition_on", "[caption]", "--pretrained_text_encoder", "FOLDER"),
    "caption with its prior": ("--caption_prior.hidden_size", "8", "--caption_prior.warmup_steps", "2"),
    "label": ("--condition_on", "[label]"),
    "label and caption": ("--condition_on", "[label,caption]"),
    "nothing": ("--condition_on", "[]"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_should_train_trains_and_only_that(tmp_path, diffusion_flags, pretrained, autoencoder, name):
    flags = [str(pretrained) if word == "FOLDER" else word for word in CONDITIONS[name]]
    frozen_encoder = "frozen" in name
    if frozen_encoder:
        flags += ["--tokenizer", str(pretrained)]
    # With half of the conditions dropped, a few steps reach the null class as well as the others.
    flags += ["--cfg_dropout", "0.5", "--checkpointing_steps", "1", "--checkpoints_total_limit", "99"]
    folder = tmp_path / "run"
    train(folder, diffusion_flags, *flags, "--num_train_epochs", "2", "--preview_epochs", "2")
    first, last = (load_tensors(folder / f"checkpoints/step-{s:08d}/phase_diffusion.safetensors") for s in (1, 8))
    assert [key for key in first if torch.equal(first[key], last[key])] == []
    parts = {key.split(".")[0] for key in first}
    expected_parts = {"unet"} | ({"text_encoder"} if "caption" in name and not frozen_encoder else set())
    assert parts == expected_parts | ({"caption_prior"} if "prior" in name else set())
    assert ("unet.class_embedding.weight" in first) == ("label" in name)
    pipeline = load_pipeline(folder)
    vae = load_pipeline(autoencoder).vae.state_dict()
    assert all(torch.equal(tensor, vae[key]) for key, tensor in pipeline.vae.state_dict().items())
    if frozen_encoder:
        expected = tiny_text_encoder().state_dict()
        exported = pipeline.text_encoder.state_dict()
        assert all(torch.equal(exported[key], expected[key]) for key in expected)
    arguments = {"prompt": PROMPT} if "caption" in name else {}
    if "label" in name:
        arguments["class_labels"] = "swiss"
    assert np.isfinite(generate(pipeline, **arguments)).all()


def test_cached_latents_give_the_same_losses(tmp_path, diffusion_flags, cache):
    train(tmp_path / "pictures", diffusion_flags, "--preview_epochs", "0")
    train(tmp_path / "cached", diffusion_flags, "--preview_epochs", "0", "--latent_cache", str(cache))
    for name in ("loss", "val_loss", "grad_norm"):
        from_images, cached = ([float(r[name]) for r in rows(tmp_path / f) if r[name]] for f in ("pictures", "cached"))
        assert cached == pytest.approx(from_images, rel=1e-5), name


@contextmanager
def read_captions(stage) -> Iterator[list[torch.Tensor]]:
    """Collect the token ids that the text encoder reads in this context, B L for each of its forward passes."""
    read: list[torch.Tensor] = []
    hook = stage.phase.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    yield read
    hook.remove()


def lost_captions(stage, batch, read: list[torch.Tensor]) -> torch.Tensor:
    """Return which samples of the batch lost their caption, one row for each pass; check that the others kept it."""
    empty = tokenize_captions(stage.tokens.tokenizer, [""], stage.tokens.max_length)
    assert not (batch["input_ids"] == empty).all(1).any()
    lost = torch.stack([(ids == empty).all(1) for ids in read])
    assert all(torch.equal(ids[~gone], batch["input_ids"][~gone]) for ids, gone in zip(read, lost, strict=True))
    return lost


@pytest.mark.parametrize("source", ["pictures", "cache"])
def test_conditions_are_dropped_per_sample_at_the_rate_asked_for(diffusion_flags, cache, source):
    """Over 10,000 samples, the rate is within three standard deviations; no batch is dropped as a whole, and the lost
    captions change from step to step."""
    stage = stage_of(diffusion_flags, *(("--latent_cache", str(cache)) if source == "cache" else ()))
    data, phase = stage.train_data(), stage.phase
    batch = fetch(data, [SampleKey(i % len(data), i) for i in range(100)])
    with torch.no_grad(), read_captions(stage) as read:
        for step in range(100):
            dropped = Draws(0, step, range(100)).uniform("cfg_dropout") < 0.1
            caption_and_class(phase.denoiser, phase.text_encoder, phase.empty_ids, batch, dropped)
    lost = lost_captions(stage, batch, read)
    assert lost.shape == (100, 100)
    assert abs(lost.float().mean().item() - 0.1) < 3 * (0.1 * 0.9 / 10_000) ** 0.5
    per_batch = lost.float().mean(1)
    assert per_batch.max() < 0.3  # a batch dropped as a whole would have 1
    assert per_batch.std() == pytest.approx(0.03, abs=0.01)  # binomial
    per_position = lost.float().mean(0)
    assert per_position.std() == pytest.approx(0.03, abs=0.01)
    assert per_position.max() < 0.3  # frozen dropout would have 1


def test_the_rate_holds_in_the_loss_itself(diffusion_flags):
    """Training drops captions at the configured rate, validation drops none."""
    stage = stage_of(diffusion_flags)
    batch = fetch(stage.train_data(), [SampleKey(i, i) for i in range(8)])
    with torch.no_grad(), read_captions(stage) as read:
        for step in range(40):
            stage.phase(batch, Draws(0, step, range(8)))
        stage.validation_step(batch, Draws(0, "validation", range(8)))
    *trained, validated = lost_captions(stage, batch, read)
    assert not validated.any()
    share = torch.stack(trained).float().mean().item()
    assert abs(share - 0.1) < 3 * (0.1 * 0.9 / 320) ** 0.5


def test_init_from_takes_only_the_weights(tmp_path, launched, diffusion_flags):
    flags = ("--init_from", str(launched), "--learning_rate", "1e-12", "--max_train_steps", "1", "--weight_decay", "0")
    train(tmp_path / "run", diffusion_flags, *flags, "--preview_epochs", "0")
    source = load_tensors(launched / "pipeline/unet/diffusion_pytorch_model.safetensors")
    trained = tensors(tmp_path / "run", "phase_diffusion.safetensors")
    assert all(
        torch.allclose(trained[f"phase_diffusion.safetensors:unet.{name}"], tensor, atol=1e-9)
        for name, tensor in source.items()
    )
    assert rows(tmp_path / "run")[-1]["step"] == "1"


def test_a_run_that_was_started_from_another_resumes_without_it(tmp_path, launched, diffusion_flags):
    import shutil

    shutil.copytree(launched, tmp_path / "source", symlinks=True)
    flags = ("--init_from", str(tmp_path / "source"), "--preview_epochs", "0")
    train(tmp_path / "run", diffusion_flags, *flags, "--max_train_steps", "1")
    shutil.rmtree(tmp_path / "source")
    assert train(tmp_path / "run", diffusion_flags, *flags, "--max_train_steps", "2") == 0
