"""distill_latent_diffusion.py as users start it: the student, its pipeline, its teacher, resuming, and user errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from pipelines import sample
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.scripts.conftest import COMMON
from tests.scripts.test_bad_input import nothing_was_trained, refusal
from tests.support.runs import ROOT, assert_same_state, launch, rows, sigterm_in_step, tensors
from tests.support.tiny_models import tiny_pipeline
from tests.support.tiny_published import PUBLISHED
from training import distill_latent_diffusion, evaluate, train_controlnet, train_latent_diffusion
from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.objectives.few_steps import euler
from training.run.checkpoint import load_tensors

SCRIPT = ROOT / "training/distill_latent_diffusion.py"
PROMPT = "a minimalist poster, blue on cream, title at the top"
TINY = (
    *("--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"),
    *("--lr_warmup_steps", "0", "--num_previews", "2", "--num_steps", "3", "--guidance_scale", "2"),
)
PIXELS = (
    *("--denoiser", "transformer", "--vae", "pixels", "--transformer.hidden_size", "32"),
    *("--transformer.num_layers", "1", "--transformer.num_attention_heads", "2", "--transformer.patch_size", "16"),
)


def distil(folder: Path, flags, *more: str) -> int:
    forget_accelerate()
    return distill_latent_diffusion.main([*flags, "--output_dir", str(folder), "--num_train_epochs", "1", *more])


def stage_of(flags, *more: str) -> distill_latent_diffusion.DistillationStage:
    config = parse_config(distill_latent_diffusion.Config, [*flags, *more])
    return distill_latent_diffusion.DistillationStage(config, StageContext())


def trained(folder: Path, *flags: str) -> Path:
    forget_accelerate()
    words = ("--output_dir", str(folder), "--max_train_steps", "2", "--preview_epochs", "0")
    assert train_latent_diffusion.main([*flags, *words]) == 0
    return folder


def generate(pipeline, **arguments) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, generator=generator, output_type="np", **arguments).images


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, diffusion_flags) -> Path:
    """A run with all components: captions, and their prior."""
    prior = ("--caption_prior.hidden_size", "8", "--caption_prior.warmup_steps", "2")
    return trained(tmp_path_factory.mktemp("teacher") / "run", *diffusion_flags, *prior)


@pytest.fixture(scope="module")
def flags(teacher, posters) -> tuple[str, ...]:
    return (*COMMON, *TINY, "--dataset_name", str(posters), "--teacher", str(teacher))


@pytest.fixture(scope="module")
def launched(tmp_path_factory, flags) -> Path:
    """`python training/distill_latent_diffusion.py …`, two epochs of four steps, from another folder."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    done = launch(SCRIPT, *flags, "--output_dir", str(folder), "--num_train_epochs", "2", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder


# --- what a run leaves


def test_the_run_folder_is_complete(launched):
    files = {"config.yaml", "metrics.csv", "training_curves.png", "run.log", "record.json"}
    assert {path.name for path in launched.iterdir()} >= files | {"samples", "checkpoints", "pipeline"}
    assert {path.name for path in (launched / "samples").iterdir()} >= {"epoch_0001.png", "epoch_0002.png"}
    card = " ".join((launched / "pipeline/README.md").read_text().split())
    assert "generates in 3 steps and without guidance" in card
    assert "guidance scale of 2" in card
    last = rows(launched)[-1]
    assert all(math.isfinite(float(last[name])) for name in ("loss", "val_loss", "val_sample_error"))


def test_the_teacher_is_exported_bit_for_bit_except_for_its_network(launched, teacher):
    student, given = load_pipeline(launched), load_pipeline(teacher)
    parts = {name: part for name, part in given.components.items() if isinstance(part, torch.nn.Module)}
    assert parts.keys() == {"vae", "unet", "text_encoder", "caption_prior"}
    for name, part in parts.items():
        state, expected = student.components[name].state_dict(), part.state_dict()
        same = all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
        assert same == (name != "unet"), name


def test_all_of_the_student_is_trained_and_nothing_else(tmp_path, flags, launched):
    names = {name.split(":")[1].split(".")[0] for name in tensors(launched, "phase_distillation.safetensors")}
    assert names == {"unet"}
    saved = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "99", "--preview_epochs", "0")
    distil(tmp_path / "run", flags, *saved, "--weight_decay", "0")  # only gradients change a parameter
    first, last = (
        load_tensors(tmp_path / f"run/checkpoints/step-{step:08d}/phase_distillation.safetensors") for step in (1, 4)
    )
    assert [key for key in first if torch.equal(first[key], last[key])] == []


def test_the_pipeline_samples_in_its_steps_by_default_here_and_as_remote_code(launched, teacher):
    ours = load_pipeline(launched)
    assert type(ours.scheduler) is FlowMatchEulerDiscreteScheduler
    images = generate(ours)
    assert ours.num_timesteps == 3
    assert np.array_equal(images, generate(ours, num_inference_steps=3, guidance_scale=1.0))
    assert not np.array_equal(images, generate(ours, num_inference_steps=5))
    theirs = DiffusionPipeline.from_pretrained(launched / "pipeline", trust_remote_code=True)
    assert np.array_equal(images, generate(theirs))
    with pytest.raises(ValueError, match="`guidance_scale` is 2.5, but this model was distilled"):
        generate(ours, guidance_scale=2.5)
    own = load_pipeline(teacher)
    assert np.array_equal(generate(own), generate(own, num_inference_steps=25, guidance_scale=2.5))


def test_sample_uses_the_defaults_of_the_student(tmp_path, launched, teacher, capsys):
    words = ["--prompt", PROMPT, "--num_images", "1", "--output", str(tmp_path / "grid.png")]
    sample.main(["--model", str(launched), *words])
    assert "1 x 1 images, 3 steps of FlowMatchEulerDiscreteScheduler" in capsys.readouterr().out
    sample.main(["--model", str(teacher), *words])
    assert "1 x 1 images, 25 steps" in capsys.readouterr().out


def test_evaluate_compares_the_student_with_its_teacher(tmp_path, launched, teacher, capsys):
    forget_accelerate()
    limits = ("--cpu_threads", "1", "--extractor_resolution", "32", "--num_images", "12", "--copy_spaces", "[]")
    words = ("--model", str(launched), "--compare_with", str(teacher), "--replay_images", "0")
    asked = ("--num_inference_steps", "4", "--guidance_scale", "1.5")
    evaluate.main([*limits, *words, *asked, "--output", str(tmp_path / "e.json"), "--table", str(tmp_path / "t.md")])
    results = json.loads((tmp_path / "e.json").read_text())
    assert {name: results["sampling"][name] for name in ("steps", "guidance_scale")} == {
        "steps": 3, "guidance_scale": 1.0
    }  # fmt: skip
    compared = results["compared_with"]
    assert {name: compared["sampling"][name] for name in ("steps", "guidance_scale")} == {
        "steps": 4, "guidance_scale": 1.5
    }  # fmt: skip
    assert compared["metrics"].keys() == results["metrics"].keys()
    table = (tmp_path / "t.md").read_text().splitlines()
    assert table[0] == f"|  | {launched} | {teacher} |"
    assert table[2].startswith("| images_per_second | ")
    assert "times as fast); KID" in capsys.readouterr().out


# --- what it learns


@pytest.mark.slow
def test_the_student_learns_the_samples_of_its_teacher(flags):
    """The distance of its samples from those of the teacher falls, for the same four captions and noise."""
    stage = stage_of(flags)
    batch, draws = fetch(stage.train_data(), [SampleKey(i, 0) for i in range(4)]), Draws(0, 0, range(4))

    def error() -> float:
        with torch.no_grad():
            return stage.metrics({name: float(value) for name, value in stage.validation_step(batch, draws).items()})[
                "val_sample_error"
            ]

    before, optimizer = error(), torch.optim.Adam(stage.phase.parameters(), 3e-3)
    for _ in range(60):
        loss, _ = stage.phase(batch, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error() < before / 4


def test_a_teacher_of_as_many_steps_is_reached_by_its_own_weights(flags):
    """Without guidance and with one step of the teacher in the first step of the student, there is nothing to learn."""
    stage = stage_of(flags, "--guidance_scale", "1", "--teacher_substeps", "1", "--num_steps", "1")
    batch, draws = fetch(stage.train_data(), [SampleKey(i, 0) for i in range(4)]), Draws(0, 0, range(4))
    with torch.no_grad():
        loss, _ = stage.phase(batch, draws)
    assert float(loss) < 1e-9


def test_training_and_the_pipeline_sample_alike(flags):
    """The samples that the validation measures are those of the exported pipeline."""
    stage = stage_of(flags)
    batch, draws = fetch(stage.train_data(), [SampleKey(i, 0) for i in range(2)]), Draws(0, 0, range(2))
    pipeline = stage.pipeline()
    with torch.no_grad():
        noise, condition = stage.phase.noise_and_condition(batch, draws)
        flow = lambda x, level: stage.teacher.flow(stage.phase.student, x, level, condition)  # noqa: E731
        own = euler(noise, flow, stage.phase.levels)[-1]
    pipeline.set_progress_bar_config(disable=True)
    assert torch.allclose(pipeline(batch["caption"], latents=noise, output_type="latent").images, own, atol=1e-4)


@pytest.mark.slow
def test_the_samples_of_the_teacher_are_those_of_its_pipeline(flags):
    """With many steps, both reach the same images with guidance."""
    stage = stage_of(flags, "--teacher_substeps", "40")
    batch, draws = fetch(stage.train_data(), [SampleKey(i, 0) for i in range(2)]), Draws(0, 0, range(2))
    noise, condition = stage.phase.noise_and_condition(batch, draws)
    own = stage.phase.samples(noise, condition, batch, draws)[-1]
    pipeline = stage.teacher.pipeline
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 400, "guidance_scale": 2.0, "latents": noise, "output_type": "latent"}
    expected = pipeline(batch["caption"], **options).images
    assert float((own - expected).square().mean() / expected.square().mean()) < 1e-3


def test_a_transformer_on_pixels(tmp_path, diffusion_flags, posters):
    """Its teacher removes faint noise after sampling, which the student has learned and does not repeat."""
    teacher = trained(tmp_path / "teacher", *diffusion_flags, *PIXELS)
    assert load_pipeline(teacher).transformer.config.restart_levels
    flags = (*COMMON, *TINY, "--dataset_name", str(posters), "--teacher", str(teacher))
    assert distil(tmp_path / "run", flags, "--max_train_steps", "2") == 0
    student = load_pipeline(tmp_path / "run")
    assert not student.transformer.config.restart_levels
    assert generate(student).shape == (1, 64, 64, 3)


# --- sessions


def test_interrupted_in_mid_epoch_and_resumed(tmp_path, launched, flags, monkeypatch):
    """Gradients accumulate over two micro-batches; a SIGTERM arrives in the second step of the second epoch."""
    with sigterm_in_step(5, distill_latent_diffusion.DistillationPhase, monkeypatch):
        assert distil(tmp_path / "run", flags, "--num_train_epochs", "2") == 75
    assert json.loads((tmp_path / "run/checkpoints/latest/trainer_state.json").read_text())["step"] in (6, 7)
    assert distil(tmp_path / "run", flags, "--num_train_epochs", "2") == 0
    assert_same_state(tmp_path / "run", launched)


# --- user errors


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Pipelines of other kinds, by name, and a model that was trained on other captions."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("autoencoder", "controlnet", "captioned"):
        PUBLISHED[name]().save_pretrained(folder / name)
    tiny_pipeline("flow_prediction").save_pretrained(folder / "other_captions")
    (folder / "empty").mkdir()
    return folder


REFUSED = {
    "no teacher": (["--teacher", ""], ["--teacher is not set"]),
    "a student": (["--teacher", "STUDENT"], ["was distilled to 3 steps already"]),
    "a folder without a pipeline": (["--teacher", "PUBLISHED/empty"], ["does not contain a pipeline"]),
    "an autoencoder": (["--teacher", "PUBLISHED/autoencoder"], ["AutoencoderPipeline", "train_latent_diffusion.py"]),
    "a ControlNet": (["--teacher", "PUBLISHED/controlnet"], ["FusionControlNetPipeline"]),
    "another prediction type": (["--teacher", "PUBLISHED/captioned"], ["predicts epsilon", "flow_prediction"]),
    "a teacher of another size": (["--resolution", "32"], ["--resolution 32", "64 x 64"]),
    "a teacher of another dataset": (
        ["--teacher", "PUBLISHED/other_captions", "--resolution", "8"], ["does not know", "words in the captions"]
    ),
    "transparent images": (["--image_mode", "rgba"], ["--image_mode rgba", "3 channels", "--image_mode rgb"]),
    "no steps": (["--num_steps", "0"], ["--num_steps is 0"]),
    "many steps": (["--num_steps", "9"], ["--num_steps is 9"]),
    "guidance of the student": (["--preview_guidance_scale", "2"], ["--preview_guidance_scale is 2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_configuration_is_one_message(tmp_path, flags, launched, published, capfd, name):
    words, named = REFUSED[name]
    known = {"STUDENT": str(launched), "PUBLISHED": str(published)}
    for short, path in known.items():
        words = [word.replace(short, path) for word in words]
    folder = tmp_path / "run"
    message = refusal(distill_latent_diffusion, [*flags, "--output_dir", str(folder), *words], capfd)
    assert [word for word in named if word not in message] == [], message
    assert nothing_was_trained(folder)


def test_the_teacher_of_a_run_cannot_change(tmp_path, launched, flags, diffusion_flags, capfd):
    prior = ("--caption_prior.hidden_size", "8", "--caption_prior.warmup_steps", "2", "--seed", "1")
    other = trained(tmp_path / "other", *diffusion_flags, *prior)
    words = [*flags, "--output_dir", str(launched), "--teacher", str(other), "--num_train_epochs", "3"]
    assert "teacher" in refusal(distill_latent_diffusion, words, capfd)


def test_a_controlnet_does_not_steer_a_student(tmp_path, launched, posters, capfd):
    words = [*COMMON, "--dataset_name", str(posters), "--base_model", str(launched), "--recipe", "none"]
    masks = ["--conditioning_image_column", "[text_mask, image_mask]", "--output_dir", str(tmp_path / "run")]
    assert "was distilled to 3 steps" in refusal(train_controlnet, [*words, *masks], capfd)


def test_a_model_that_was_not_distilled_is_compared_in_another_way(teacher, capfd):
    words = ["--cpu_threads", "1", "--model", str(teacher), "--compare_with", str(teacher)]
    assert "--compare_with is for a model that was distilled" in refusal(evaluate, words, capfd)
