"""One command finds out what a folder of images has, makes what is missing, and trains."""

from __future__ import annotations

import csv
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines.tools.cli import UserError
from tests.conftest import ROOT
from tests.support.runs import command, environment, launch
from training import train_autoencoder, train_controlnet, train_image_caption, train_latent_diffusion
from training.core.parsing import parse_config
from training.models.transformer import build_transformer
from training.models.unet import build_unet
from training.recipes.completion import (
    complete_autoencoder,
    complete_controlnet,
    complete_image_caption,
    complete_latent_diffusion,
)
from training.recipes.settings import latent_cells

SCRIPT = ROOT / "training/train_latent_diffusion.py"
SHORT = ("--max_train_steps", "2", "--report_to", "none", "--cpu_threads", "1", "--num_previews", "2",
         "--preview_inference_steps", "2")  # fmt: skip
UNET = ("--train_data_dir", "pics", "--denoiser", "unet")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def draw(folder: str, count: int = 24, *, captions: bool = False, classes: tuple[str, ...] = ()) -> str:
    generator = np.random.default_rng(0)
    rows = []
    for i in range(count):
        name = f"{classes[i % len(classes)]}/{i}.png" if classes else f"{i}.png"
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(path)
        rows.append((name, f"a noisy image of the number {i}"))
    if captions:
        with Path(folder, "captions.csv").open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, delimiter=";").writerows([("file", "caption"), *rows])
    return folder


def diffusion(*words: str) -> train_latent_diffusion.Config:
    return parse_config(train_latent_diffusion.Config, words, complete=complete_latent_diffusion)


@pytest.mark.parametrize(
    ("parts", "conditions", "name"),
    [
        ({"captions": True, "classes": ("bus", "train")}, ["caption", "label"], "caption_label"),
        ({"captions": True}, ["caption"], "caption"),
        ({"classes": ("bus", "car", "train")}, ["label"], "label"),
        ({}, [], "unconditional"),
    ],
)
def test_what_is_there_decides_the_conditions(parts, conditions, name):
    pixels = diffusion("--train_data_dir", draw("pics", **parts))
    assert (pixels.condition_on, pixels.denoiser, pixels.vae) == (conditions, "transformer", "pixels")
    assert (pixels.output_dir, pixels.latent_cache) == (f"runs/pics/latent_diffusion_64_{name}", None)
    assert list(pixels.prepare) == (["runs/pics/tokenizer"] if parts.get("captions") else [])
    config = diffusion(*UNET)
    assert config.condition_on == conditions
    assert config.output_dir == f"runs/pics/latent_diffusion_64_{name}"
    assert config.tokenizer == ("runs/pics/tokenizer" if parts.get("captions") else None)
    assert (config.vae, config.latent_cache) == ("runs/pics/autoencoder_64", "runs/pics/latents_64")
    scripts = [
        line.split()[0].removeprefix("training/").removeprefix("data_scripts/") for line in config.prepare.values()
    ]
    tokenizer = ["train_tokenizer.py"] if parts.get("captions") else []
    assert scripts == [*tokenizer, "train_autoencoder.py", "precompute_latents.py"]
    assert list(config.prepare) == list(config.recipes())


def test_models_of_one_collection_share_the_autoencoder_and_the_latents():
    draw("pics", captions=True, classes=("bus", "train"))
    configs = [diffusion(*UNET, "--condition_on", kind) for kind in ("caption", "label", "none")]
    assert len({config.output_dir for config in configs}) == 3
    assert len({(config.vae, config.latent_cache, config.prepare[f"{config.vae}/pipeline"]) for config in configs}) == 1


def test_images_of_another_mode_have_models_of_their_own():
    draw("pics")
    config = diffusion(*UNET, "--image_mode", "rgba")
    assert config.output_dir == "runs/pics/rgba/latent_diffusion_64_unconditional"
    assert (config.vae, config.latent_cache) == ("runs/pics/rgba/autoencoder_64", "runs/pics/rgba/latents_64")
    assert all("--image_mode rgba" in line for line in config.prepare.values())
    assert diffusion(*UNET).vae == "runs/pics/autoencoder_64"
    assert diffusion("--train_data_dir", "pics", "--image_mode", "l").vae == "pixels"


def test_what_is_given_is_kept_and_passed_on():
    draw("pics")
    config = diffusion(
        "--train_data_dir", "pics", "--learning_rate", "0.25", "--resolution", "128", "--max_train_samples", "20",
        "--max_train_steps", "50", "--output_dir", "elsewhere", "--model.block_out_channels", "[32]",
    )  # fmt: skip
    assert (config.learning_rate, config.max_train_steps, config.output_dir) == (0.25, 50, "elsewhere")
    assert (config.model.block_out_channels, config.model.attention_levels) == ([32], [0])
    for line in config.prepare.values():
        assert "--train_data_dir pics" in line
        assert "--resolution 128" in line
        assert "--max_train_samples 20" in line
    autoencoder, latents = config.prepare.values()
    assert "--max_train_steps 50" in autoencoder
    assert "--max_train_steps" not in latents
    assert any("--max_train_steps 50 limits every training" in line for line in config.announcements)


def test_a_time_limit_is_divided_between_the_trainings():
    draw("pics")
    config = diffusion(*UNET, "--max_train_minutes", "30")
    assert config.max_train_minutes == 30  # counted from the start of the command, so the last training has the rest
    assert config.prepare["runs/pics/autoencoder_64/pipeline"].endswith("--max_train_minutes 10")
    expected = "of 30 minutes, at most 10 are for the autoencoder; the last training gets the rest"
    assert expected in config.announcements


def test_a_dry_run_estimates_nothing_where_it_has_nothing_to_estimate():
    config = parse_config(
        train_image_caption.Config,
        ["--train_data_dir", draw("pics", captions=True), "--dry_run"],
        complete=complete_image_caption,
    )
    assert not any("minute" in line or "MiB" in line for line in config.announcements)


def test_a_vae_of_ones_own_skips_the_autoencoder(tmp_path):
    from tests.support.tiny_models import tiny_vae

    tiny_vae().save_pretrained(tmp_path / "mine")
    config = diffusion("--train_data_dir", draw("pics"), "--vae", "mine")
    assert list(config.prepare) == ["runs/pics/latents_64_mine/cache.json"]
    assert config.output_dir == "runs/pics/latent_diffusion_64_mine_unconditional"


def test_a_batch_larger_than_the_collection_is_lowered_and_said():
    config = diffusion("--train_data_dir", draw("pics", 10), "--train_batch_size", "64")
    assert config.train_batch_size == 9  # one image is held out
    assert any("--train_batch_size 64 is lowered to 9" in line for line in config.announcements)


@pytest.mark.parametrize("words", [("--recipe", "none"), ("--config", "mine.yaml")])
def test_the_choice_can_be_turned_off(words, tmp_path):
    (tmp_path / "mine.yaml").write_text("resolution: 64\n", encoding="utf-8")
    flags = ["--train_data_dir", draw("pics"), "--vae", "x", "--condition_on", "none", *words]
    config = diffusion(*flags)
    default = train_latent_diffusion.Config(vae="x")
    assert (config.learning_rate, config.latent_cache, config.prepare) == (default.learning_rate, None, {})
    assert not Path("runs").exists()


def test_the_other_stages_start_as_simply():
    draw("pics", captions=True)
    flags = ["--train_data_dir", "pics"]
    autoencoder = parse_config(train_autoencoder.Config, flags, complete=complete_autoencoder)
    assert autoencoder.output_dir == "runs/pics/autoencoder_64"
    controlnet = parse_config(train_controlnet.Config, flags, complete=complete_controlnet)
    assert controlnet.base_model == diffusion(*flags).output_dir
    assert controlnet.dataset_name == "runs/pics/controls_64_soft_edges"
    assert controlnet.prepare == controlnet.recipes()
    controls, base = controlnet.prepare.values()
    assert "--denoiser unet" in base  # a ControlNet steers a U-Net
    assert controls.startswith("data_scripts/make_controls.py --train_data_dir pics ")
    assert base.startswith("training/train_latent_diffusion.py --train_data_dir pics ")
    joint = parse_config(train_image_caption.Config, flags, complete=complete_image_caption)
    assert joint.output_dir == "runs/pics/image_caption_64"
    draw("bare")
    with pytest.raises(UserError, match="bare has no captions"):
        parse_config(train_image_caption.Config, ["--train_data_dir", "bare"], complete=complete_image_caption)


@pytest.mark.parametrize("resolution", [16, 32, 48, 64, 128, 256])
def test_the_settings_are_valid_at_every_usual_resolution(resolution):
    draw("pics", captions=True)
    words = ("--train_data_dir", "pics", "--resolution", str(resolution))
    parse_config(train_autoencoder.Config, words, complete=complete_autoencoder)
    parse_config(train_image_caption.Config, words, complete=complete_image_caption)
    parse_config(train_controlnet.Config, words, complete=complete_controlnet)
    build_unet(diffusion(*words, "--denoiser", "unet").model, 16, latent_cells(resolution), None, 0, 0)
    build_transformer(diffusion(*words, "--denoiser", "transformer").transformer, 3, resolution, None, 0)


def test_a_transformer_needs_no_autoencoder():
    draw("pics", captions=True)
    config = diffusion("--train_data_dir", "pics", "--denoiser", "transformer", "--max_train_minutes", "30")
    assert (config.vae, config.latent_cache, config.max_train_minutes) == ("pixels", None, 30)
    assert config.output_dir == "runs/pics/latent_diffusion_64_caption"
    assert list(config.prepare) == ["runs/pics/tokenizer"]
    Path(config.output_dir).mkdir(parents=True)
    Path(config.output_dir, "config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    tuned = diffusion("--train_data_dir", "pics", "--init_from", config.output_dir)
    assert (tuned.denoiser, tuned.vae, tuned.transformer) == ("transformer", "pixels", config.transformer)
    earlier = config.to_dict()  # of a version whose transformer had no convolutions
    assert earlier["transformer"].pop("conv_layers") > 0
    Path(config.output_dir, "config.yaml").write_text(yaml.safe_dump(earlier), encoding="utf-8")
    assert diffusion("--train_data_dir", "pics", "--init_from", config.output_dir).transformer.conv_layers == 0


@pytest.mark.parametrize("words", [("--crop_scale", "0.5"), ("--center_crop", "false")])
def test_random_crops_are_not_cached(words):
    draw("pics")
    assert diffusion(*UNET).latent_cache
    assert not diffusion(*UNET, *words).latent_cache


def test_a_resumed_run_keeps_what_was_decided_when_it_began():
    """Images are not the only thing that decides: another device would choose other networks."""
    draw("pics")
    flags = ("--train_data_dir", "pics")
    config = diffusion(*UNET)
    settings = config.to_dict() | {"learning_rate": 0.125, "latent_cache": None}
    settings["model"]["block_out_channels"] = [96, 160]
    Path(config.output_dir, "checkpoints").mkdir(parents=True)
    Path(config.output_dir, "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    again = diffusion(*flags)
    assert (again.learning_rate, again.model.block_out_channels, again.latent_cache) == (0.125, [96, 160], None)
    assert diffusion(*flags, "--learning_rate", "0.5").learning_rate == 0.5


def test_a_run_from_before_an_option_existed_keeps_its_default():
    draw("pics")
    words = ("--train_data_dir", "pics")

    def autoencoder() -> train_autoencoder.Config:
        return parse_config(train_autoencoder.Config, words, complete=complete_autoencoder)

    config = autoencoder()
    assert config.crop_scale == 0.5
    settings = config.to_dict()
    del settings["crop_scale"]
    Path(config.output_dir, "checkpoints").mkdir(parents=True)
    Path(config.output_dir, "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert autoencoder().crop_scale == 1


def test_fine_tuning_takes_the_networks_of_the_model_that_it_begins_with(tmp_path):
    from tests.support.tiny_models import tiny_vae

    tiny_vae().save_pretrained(tmp_path / "their_vae")
    draw("first", captions=True)
    first = diffusion("--train_data_dir", "first", "--vae", "their_vae", "--model.block_out_channels", "[64]")
    Path(first.output_dir).mkdir(parents=True)
    Path(first.output_dir, "config.yaml").write_text(yaml.safe_dump(first.to_dict()), encoding="utf-8")
    second = diffusion("--train_data_dir", draw("second", 30, captions=True), "--init_from", first.output_dir)
    assert (second.vae, second.tokenizer) == ("their_vae", "runs/first/tokenizer")
    assert (second.model, second.text_encoder) == (first.model, first.text_encoder)
    assert second.output_dir == "runs/second/latent_diffusion_64_their_vae_caption_finetuned"
    assert list(second.prepare) == ["runs/second/latents_64_their_vae/cache.json"]


def test_a_dry_run_says_what_it_found_and_decided_before_the_settings(tmp_path):
    draw("pics", captions=True, classes=("bus", "train"))
    Path("pics/bus/portrait.heif").write_bytes(b"x")
    run = launch(
        SCRIPT, "--train_data_dir", "pics", "--dry_run", "--print_config", "--max_train_steps", "30", cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    report, settings = run.stdout.split(
        "parameter counts, shapes and memory can be estimated once these inputs exist\n"
    )
    for part in (
        "24 in train; captions: column caption of captions.csv",
        "2 classes (bus, train)",
        "Left out: ",
        "transformer on pixels",
        "latent diffusion: 30 steps of 16 images (21 epochs), about ",
        "MiB on the disk",
        "data_scripts/train_tokenizer.py --train_data_dir pics",
    ):
        assert part in report
    assert yaml.safe_load(settings)["condition_on"] == ["caption", "label"]
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_its_preparation_is_completed_by_the_same_command(tmp_path):
    draw("pics", captions=True)
    flags = (*UNET, *SHORT)
    process = subprocess.Popen(
        command(SCRIPT, *flags),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "runs/pics/autoencoder_64/checkpoints").is_dir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    again = launch(SCRIPT, *flags, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "runs/pics/autoencoder_64/pipeline is missing; making it (1 of 2)" in again.stdout
    assert (tmp_path / "runs/pics/latent_diffusion_64_caption/pipeline/model_index.json").is_file()
    assert "try it: python pipelines/sample.py" in again.stdout
