"""train_controlnet.py as users start it: the base model stays unchanged, control metrics, resuming, and user errors.

B samples, C control channels, H W pixels.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Image
from diffusers import DiffusionPipeline
from PIL import Image as PILImage

from pipelines.fusion_controlnet_pipeline import FusionControlNetPipeline
from pipelines.layout_analysis import LayoutAnalysisPipeline
from pipelines.models.fusion_controlnet import FUSION_MODES
from pipelines.models.layout_encoder import LayoutEncoderModel
from pipelines.poster_controlnet_pipeline import PosterControlNetPipeline
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.scripts.conftest import COMMON
from tests.scripts.test_bad_input import nothing_was_trained, refusal
from tests.scripts.test_train_decoder import TINY as TINY_DECODER
from tests.support.runs import ROOT, assert_same_state, launch, rows, sigterm_in_step, tensors
from training import train_controlnet, train_decoder, train_latent_diffusion
from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.exchange import ALONE
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.data.images import load_split
from training.models.steered import load_base
from training.run.checkpoint import load_tensors

SCRIPT = ROOT / "training/train_controlnet.py"
TINY = (
    *("--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"),
    *("--lr_warmup_steps", "0", "--num_previews", "2", "--preview_inference_steps", "2", "--num_read", "3"),
    *("--recipe", "none"),
)
MASKS = ("--conditioning_image_column", "[text_mask, image_mask]")
ROLES = ("--conditioning_image_column", "color_role", "--conditioning_classes", "6")
PROMPT = "a minimalist poster, blue on cream, one picture"
METRICS = {
    "val_loss", "val_loss_without_control", "val_loss_shuffled_control", "val_control_sensitivity",
    "val_shuffled_sensitivity", "val_control_gain_in_standard_errors", "val_control_iou", "val_shuffled_iou",
    "val_iou_gain_in_standard_errors",
}  # fmt: skip


def train(folder: Path, flags, *more: str) -> int:
    forget_accelerate()
    return train_controlnet.main([*flags, "--output_dir", str(folder), "--num_train_epochs", "1", *more])


def stage_of(flags, *more: str) -> train_controlnet.ControlNetStage:
    return train_controlnet.ControlNetStage(parse_config(train_controlnet.Config, [*flags, *more]), StageContext())


@pytest.fixture(scope="module")
def base(tmp_path_factory, diffusion_flags) -> Path:
    """A run of latent diffusion, captioned posters."""
    folder = tmp_path_factory.mktemp("base") / "latent"
    forget_accelerate()
    more = ("--output_dir", str(folder), "--max_train_steps", "2", "--preview_epochs", "0")
    assert train_latent_diffusion.main([*diffusion_flags, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, posters) -> Path:
    """A run of the poster decoder, at 32 pixels."""
    folder = tmp_path_factory.mktemp("base") / "decoder"
    forget_accelerate()
    more = ("--output_dir", str(folder), "--max_train_steps", "2", "--preview_epochs", "0")
    assert train_decoder.main([*TINY_DECODER, "--dataset_name", str(posters), *more]) == 0
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reader")
    encoder = LayoutEncoderModel((8, 16), patch_size=2, sample_size=64).eval()
    LayoutAnalysisPipeline(encoder=encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(base, posters, reader) -> tuple[str, ...]:
    data = ("--dataset_name", str(posters), "--base_model", str(base), "--reader", str(reader))
    return (*COMMON, *TINY, *data, *MASKS)


@pytest.fixture(scope="module")
def decoder_flags(decoder, posters, reader) -> tuple[str, ...]:
    data = ("--dataset_name", str(posters), "--base_model", str(decoder), "--reader", str(reader))
    return (*COMMON, "--resolution", "32", *TINY, *data, *ROLES)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, flags) -> Path:
    """`python training/train_controlnet.py …`, two epochs of four steps, from another folder."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    done = launch(SCRIPT, *flags, "--output_dir", str(folder), "--num_train_epochs", "2", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def of_decoder(tmp_path_factory, decoder_flags) -> Path:
    """A run of four steps on the poster decoder, controlled by class ids."""
    folder = tmp_path_factory.mktemp("of_decoder") / "run"
    assert train(folder, decoder_flags, "--fusion_mode", "cross_attention") == 0
    return folder


# --- what a run leaves


def test_the_run_folder_is_complete(launched):
    files = {"config.yaml", "metrics.csv", "training_curves.png", "run.log", "record.json"}
    assert {path.name for path in launched.iterdir()} >= files | {"samples", "checkpoints", "pipeline"}
    samples = {"epoch_0001.png", "epoch_0002.png", "progress.png"}
    assert {p.name for p in (launched / "samples").iterdir()} == samples
    card = (launched / "pipeline/README.md").read_text()
    assert "that follow a control image" in card
    assert "text_mask" in card
    record = json.loads((launched / "record.json").read_text())
    assert record["sample_captions"][::3] == ["control"] * len(record["prompts"])
    assert record["sample_captions"][1::3] == record["prompts"]


@pytest.mark.parametrize("run", ["launched", "of_decoder"])
def test_every_row_has_its_metrics(request, run):
    logged = rows(request.getfixturevalue(run))
    assert [int(row["step"]) for row in logged] == list(range(1, len(logged) + 1))
    assert all(math.isfinite(float(row["loss"])) for row in logged)
    at_epochs = logged[3::4]
    assert len(at_epochs) == len(logged) // 4
    for row in at_epochs:
        values = {name: float(row[name]) for name in METRICS}
        assert all(math.isfinite(value) for value in values.values())
        assert all(0 <= values[name] <= 1 for name in ("val_control_iou", "val_shuffled_iou"))
        assert values["val_control_sensitivity"] > 0
        assert values["val_shuffled_sensitivity"] > 0


def test_the_base_alone_is_the_same_throughout(launched):
    """The loss without control is that of the base model, which is not trained."""
    assert len({row["val_loss_without_control"] for row in rows(launched) if row["val_loss"]}) == 1


@pytest.mark.parametrize(("run", "source"), [("launched", "base"), ("of_decoder", "decoder")])
def test_the_frozen_base_is_exported_bit_for_bit(request, run, source):
    trained, given = (load_pipeline(request.getfixturevalue(name)) for name in (run, source))
    for name, part in given.components.items():
        if isinstance(part, torch.nn.Module):
            state, expected = trained.components[name].state_dict(), part.state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items()), name
    assert {key.split(".")[0] for key in trained.components} - set(given.components) == {"controlnet"}


def test_only_the_controlnet_is_trained_and_all_of_it(tmp_path, flags, launched):
    names = {name.split(":")[1].split(".")[0] for name in tensors(launched, "phase_controlnet.safetensors")}
    assert names == {"controlnet"}
    saved = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "99", "--preview_epochs", "0")
    # Without weight decay, only gradients change a parameter.
    train(tmp_path / "run", flags, *saved, "--weight_decay", "0", "--num_train_epochs", "2")
    first, last = (
        load_tensors(tmp_path / f"run/checkpoints/step-{step:08d}/phase_controlnet.safetensors") for step in (1, 8)
    )
    assert [key for key in first if torch.equal(first[key], last[key])] == []


def test_the_pipeline_has_the_ema_weights(launched):
    ema = load_tensors(launched / "checkpoints/latest/ema.safetensors")
    for folder in (launched / "pipeline", launched / "checkpoints/latest/pipeline"):
        exported = load_tensors(folder / "controlnet/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tensor, ema[f"controlnet.{name}"]) for name, tensor in exported.items())


def test_the_pipeline_draws_here_and_as_remote_code_alike(launched, base, posters):
    row = load_split(parse_config(train_controlnet.Config, ["--dataset_name", str(posters), "--base_model", "x"]),
                     "validation", 0)[0]  # fmt: skip
    masks = [row["text_mask"], row["image_mask"]]

    def generate(pipeline, **control) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline(PROMPT, num_inference_steps=3, generator=generator, output_type="np", **control).images

    ours = load_pipeline(launched)
    assert type(ours) is FusionControlNetPipeline
    assert list(ours.controlnet.config.control_names) == ["text_mask", "image_mask"]
    steered = generate(ours, control_image=masks)
    assert steered.shape == (1, 64, 64, 3)
    theirs = DiffusionPipeline.from_pretrained(launched / "pipeline", trust_remote_code=True)
    assert np.array_equal(generate(theirs, control_image=masks), steered)
    assert np.array_equal(generate(ours), generate(load_pipeline(base)))
    assert not np.array_equal(generate(ours), steered)


# --- sessions


def test_interrupted_in_mid_epoch_and_resumed(tmp_path, launched, flags, monkeypatch):
    """Gradients accumulate over two micro-batches; a SIGTERM arrives in the second step of the second epoch."""
    with sigterm_in_step(5, train_controlnet.ControlNetPhase, monkeypatch):
        assert train(tmp_path / "run", flags, "--num_train_epochs", "2") == 75
    assert json.loads((tmp_path / "run/checkpoints/latest/trainer_state.json").read_text())["step"] in (6, 7)
    assert train(tmp_path / "run", flags, "--num_train_epochs", "2") == 0
    assert_same_state(tmp_path / "run", launched)


def test_init_from_takes_only_the_controlnet_weights(tmp_path, launched, flags):
    more = ("--init_from", str(launched), "--learning_rate", "1e-12", "--max_train_steps", "1", "--weight_decay", "0")
    train(tmp_path / "run", flags, *more, "--preview_epochs", "0")
    source = load_tensors(launched / "pipeline/controlnet/diffusion_pytorch_model.safetensors")
    trained = tensors(tmp_path / "run", "phase_controlnet.safetensors")
    for name, tensor in source.items():
        assert torch.allclose(trained[f"phase_controlnet.safetensors:controlnet.{name}"], tensor, atol=1e-9), name
    assert rows(tmp_path / "run")[-1]["step"] == "1"


# --- controls


def test_class_ids_are_one_hot(of_decoder, decoder_flags, posters):
    stage = stage_of(decoder_flags)
    batch = fetch(stage.train_data(), [SampleKey(i, 0) for i in range(4)])
    control = batch["conditioning_pixel_values"]
    assert control.shape == (4, 6, 32, 32)
    assert (control.sum(1) == 1).all()
    stored = load_split(stage.config, "train", 0)
    for one, row in zip(control, stored.select(range(4)), strict=True):
        smaller = row["color_role"].resize((32, 32), PILImage.Resampling.NEAREST)
        assert np.array_equal(one.argmax(0).numpy(), np.asarray(smaller))
    pipeline = load_pipeline(of_decoder)
    assert type(pipeline) is PosterControlNetPipeline
    assert (pipeline.controlnet.config.control_kind, pipeline.controlnet.config.conditioning_channels) == ("classes", 6)
    pipeline.set_progress_bar_config(disable=True)
    roles = load_split(stage.config, "validation", 0)[0]["color_role"].resize((32, 32), PILImage.Resampling.NEAREST)
    assert pipeline({"style": "pop"}, roles, num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.parametrize("mode", FUSION_MODES)
def test_before_the_first_step_the_control_changes_nothing(flags, mode, caplog):
    """In every mode the three losses equal that of the base model, bit for bit, and the run warns about it."""
    stage = stage_of(flags, "--fusion_mode", mode)
    batch = fetch(stage.validation_data(), [SampleKey(i, i) for i in range(4)])
    with torch.no_grad():
        sums = stage.validation_step(batch, Draws(0, "validation", range(4)))
    with caplog.at_level(logging.WARNING, "halftone"):
        logging.getLogger("halftone").propagate = True
        metrics = stage.metrics({name: float(value) for name, value in sums.items()})
    assert metrics["val_loss"] == metrics["val_loss_without_control"] == metrics["val_loss_shuffled_control"]
    assert metrics["val_control_sensitivity"] == metrics["val_shuffled_sensitivity"] == 0
    assert metrics["val_control_gain_in_standard_errors"] == 0
    assert "the model ignores its control" in caplog.text


@pytest.mark.parametrize("rate", ["0", "0.3", "1"])
def test_controls_are_dropped_per_sample_at_the_rate_asked_for_and_never_in_validation(flags, rate):
    stage = stage_of(flags, "--control_dropout", rate)
    seen: list[torch.Tensor] = []
    stage.controlnet.register_forward_pre_hook(
        lambda net, args, kwargs: seen.append(kwargs["controlnet_cond"].flatten(1).any(1)), with_kwargs=True
    )
    batch = fetch(stage.train_data(), [SampleKey(i, i) for i in range(8)])
    assert batch["conditioning_pixel_values"].flatten(1).any(1).all()
    with torch.no_grad():
        for step in range(30):
            stage.phase(batch, Draws(0, step, range(8)))
        kept = torch.stack(seen).float()
        seen.clear()
        stage.config.reader, stage.reader = None, None
        stage.validation_step(batch, Draws(0, "validation", range(8)))
    dropped = 1 - kept.mean().item()
    assert abs(dropped - float(rate)) <= 3 * (float(rate) * (1 - float(rate)) / 240) ** 0.5
    assert rate != "0.3" or not set(kept.mean(1).tolist()) <= {0.0, 1.0}, "not the batch as a whole"
    assert all(all(shown.tolist()) for shown in seen)


def test_previews_have_the_training_resolution_even_if_the_base_has_another(flags):
    stage = stage_of(flags, "--resolution", "32")
    shown = stage.previews(ALONE)
    assert {image.size for image in shown.images} == {(32, 32)}
    assert shown.captions[::3] == ["control"] * 2


# --- bad input


@pytest.fixture(scope="module")
def other_size(tmp_path_factory) -> Path:
    """Captioned images with control images, of which the last one has half the size of its image."""
    folder = tmp_path_factory.mktemp("sizes") / "data"
    images = [PILImage.new("RGB", (64, 64))] * 16
    controls = [*images[1:], PILImage.new("RGB", (32, 32))]
    table = Dataset.from_dict({"image": images, "text": ["a poster"] * 16, "conditioning_image": controls})
    table = table.cast_column("image", Image()).cast_column("conditioning_image", Image())
    DatasetDict({"train": table}).save_to_disk(folder)
    return folder


REFUSED = {
    "no base model": (["--base_model", ""], ["--base_model", "train_latent_diffusion.py"]),
    "a base that is not there": (["--base_model", "/nowhere/x"], ["/nowhere/x"]),
    "a base of another kind": (["--base_model", "AUTOENCODER"], ["AutoencoderPipeline", "train_decoder.py"]),
    "a resolution that the latents do not divide": (["--resolution", "60"], ["--resolution 60", "VAE"]),
    "a resolution that the decoder cannot halve": (
        ["--base_model", "DECODER", *ROLES, "--resolution", "33"], ["--resolution 33", "multiple of 2"]
    ),
    "a control of another size": (
        ["--dataset_name", "OTHER_SIZE", "--conditioning_image_column", "conditioning_image", "--reader", "null",
         "--validation_fraction", "0"],
        ["row 15", "'conditioning_image'", "32×32", "64×64"],
    ),
    "class ids beyond": ([*ROLES, "--conditioning_classes", "3", "--reader", "null"], ["beyond the 3 classes"]),
    "classes of several columns": (["--conditioning_classes", "6"], ["--conditioning_classes", "one column"]),
    "classes and a mode": ([*ROLES, "--conditioning_image_mode", "l"], ["--conditioning_image_mode l"]),
    "several, in colour": (["--conditioning_image_mode", "rgb"], ["--conditioning_image_mode rgb", "image_mask"]),
    "no columns": (["--conditioning_image_column", "[]"], ["--conditioning_image_column"]),
    "a column that is not there": (["--conditioning_image_column", "mask"], ["'mask'", "--conditioning_image_column"]),
    "a column of numbers": (["--conditioning_image_column", "energy"], ["'energy'", "--conditioning_image_column"]),
    "a reader of masks for images": (["--conditioning_image_column", "image"], ["--reader", "kind image"]),
    "a reader of other masks": (
        ["--conditioning_image_column", "[text_mask, hierarchy]"], ["--reader", "hierarchy", "text_mask and image_mask"]
    ),
    "a reader of other classes": ([*ROLES, "--conditioning_classes", "7"], ["--reader", "7 channels", "6 classes"]),
    "a reader without a segmentation head": ([*ROLES, "--reader", "AUTOENCODER"], ["--reader", "segmentation head"]),
    "a reader that is none": (["--reader", "BASE"], ["--reader"]),
    "weights of another mode": (["--init_from", "RUN", "--fusion_mode", "gated"], ["--init_from", "differs from"]),
    "weights for another base": (["--init_from", "OF_DECODER"], ["--init_from", "differs from"]),
    "weights without a ControlNet": (["--init_from", "BASE"], ["--init_from", "has no controlnet"]),
    "an unknown mode": (["--fusion_mode", "multiply"], ["multiply", "--fusion_mode", "cross_attention"]),
    "dropout": (["--control_dropout", "1.5"], ["--control_dropout is 1.5"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_configuration_is_one_message(request, tmp_path, flags, capfd, name):
    fixtures = {"AUTOENCODER": "autoencoder", "BASE": "base", "RUN": "launched", "OF_DECODER": "of_decoder",
                "DECODER": "decoder",
                "OTHER_SIZE": "other_size"}  # fmt: skip
    words, named = REFUSED[name]
    words = [str(request.getfixturevalue(fixtures[word])) if word in fixtures else word for word in words]
    folder = tmp_path / "run"
    message = refusal(train_controlnet, [*flags, "--output_dir", str(folder), *words], capfd)
    assert [word for word in named if word not in message] == [], message
    assert nothing_was_trained(folder)


def test_the_base_model_of_a_run_cannot_change(tmp_path, launched, flags, decoder, capfd):
    words = [*flags, "--output_dir", str(launched), "--base_model", str(decoder), "--num_train_epochs", "3"]
    assert "base_model" in refusal(train_controlnet, words, capfd)


def test_as_a_program_it_ends_with_status_2(tmp_path, flags):
    done = launch(SCRIPT, *flags, "--output_dir", str(tmp_path / "run"), "--base_model", "/nowhere/x")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


def test_a_base_model_without_a_u_net_is_refused(tmp_path):
    from tests.pipelines.test_patch_transformer import pixel_pipeline

    pixel_pipeline().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="denoises with a transformer, but a ControlNet steers a U-Net"):
        load_base(str(tmp_path / "base"), 8)
