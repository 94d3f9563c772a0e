"""`--image_mode rgba` and `l`: from files with transparency to generated files with transparency, by every stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from data_scripts import make_emoji, precompute_latents
from pipelines import sample
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.support.tiny_models import tiny_vae
from training import evaluate, train_autoencoder, train_controlnet, train_latent_diffusion
from training.core.parsing import parse_config
from training.models.vae_loading import load_vae

SIDE, IMAGES = 32, 40
COMMON = (
    *("--report_to", "none", "--cpu_threads", "1", "--resolution", str(SIDE), "--recipe", "none"),
    *("--lr_warmup_steps", "0", "--train_batch_size", "4", "--num_train_epochs", "1", "--max_train_steps", "4"),
)
AUTOENCODER = ("--model.block_out_channels", "[16,16]", "--model.norm_num_groups", "8", "--model.patch_size", "2")
UNET = (
    *("--model.block_out_channels", "[16,32]", "--model.norm_num_groups", "8", "--model.attention_head_dim", "8"),
    *("--model.layers_per_block", "1", "--condition_on", "[]", "--num_previews", "2"),
    *("--preview_inference_steps", "2", "--evaluation_images", "8", "--evaluation_inference_steps", "2"),
)
TRANSFORMER = (
    *("--denoiser", "transformer", "--transformer.hidden_size", "32", "--transformer.num_layers", "1"),
    *("--transformer.num_attention_heads", "2"),
)
MODES = {"rgba": "RGBA", "l": "L"}


def drawing(number: int) -> Image.Image:
    """A disc on nothing, with a soft edge; the colour of what is transparent is noise, as in many files."""
    random = np.random.default_rng(number)
    alpha = Image.new("L", (SIDE * 4, SIDE * 4), 0)
    x, y = random.integers(8, 64, 2)
    ImageDraw.Draw(alpha).ellipse((x, y, x + 56, y + 56), fill=255)
    alpha = alpha.resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels[np.asarray(alpha) > 0] = random.integers(0, 256, 3)
    image = Image.fromarray(pixels)
    image.putalpha(alpha)
    return image


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("discs")
    for number in range(IMAGES):
        drawing(number).save(folder / f"{number:02}.png")
    return folder


def run(stage, folder: Path, *flags: str) -> int:
    forget_accelerate()
    return stage.main([*COMMON, *flags, "--output_dir", str(folder)])


@pytest.fixture(scope="module", params=list(MODES))
def trained(request, tmp_path_factory, discs) -> tuple[str, Path]:
    """The image mode, and a finished autoencoder."""
    folder = tmp_path_factory.mktemp(request.param) / "autoencoder"
    flags = ("--train_data_dir", str(discs), "--image_mode", request.param, "--adversarial_weight", "0.1")
    assert run(train_autoencoder, folder, *AUTOENCODER, *flags, "--discriminator_start", "1") == 0
    return request.param, folder


def on(image: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    ground = Image.new("RGBA", image.size, (*color, 255))
    return np.asarray(Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB"), dtype=float)


def test_an_autoencoder_keeps_the_mode_of_its_images(trained):
    mode, folder = trained
    pipeline = load_pipeline(folder)
    image = drawing(100)
    assert pipeline.vae.config.in_channels == pipeline.vae.config.out_channels == len(MODES[mode])
    (restored,) = pipeline(image).images
    assert restored.mode == MODES[mode]
    (elsewhere,) = DiffusionPipeline.from_pretrained(folder / "pipeline", trust_remote_code=True)(image).images
    assert elsewhere.tobytes() == restored.tobytes()
    if mode == "rgba":
        error = np.abs(np.asarray(restored.getchannel("A"), dtype=float) - np.asarray(image.getchannel("A")))
        assert error.mean() < 20, "alpha is reconstructed"
        for color in ((255, 255, 255), (0, 0, 0), (200, 30, 90)):
            assert np.abs(on(restored, color) - on(image, color)).mean() < 40


def test_the_colour_below_transparent_pixels_has_no_influence(trained):
    mode, folder = trained
    pipeline, image = load_pipeline(folder), drawing(100)
    other = np.array(image)
    other[other[..., 3] == 0] = (1, 2, 3, 0)
    assert np.abs(other.astype(int) - np.asarray(image)).max() > 100
    assert torch.equal(pipeline.encode(image), pipeline.encode(Image.fromarray(other)))


def test_arrays_and_tensors_are_the_images(trained):
    mode, folder = trained
    pipeline, image = load_pipeline(folder), drawing(100)
    image = image.convert("L") if mode == "l" else image
    array = np.asarray(image, dtype=np.float32).reshape(1, SIDE, SIDE, -1) / 255
    expected = pipeline.encode(image)
    assert torch.allclose(pipeline.encode(array), expected, atol=0.05)
    assert torch.allclose(pipeline.encode(torch.from_numpy(array).movedim(-1, 1)), expected, atol=0.05)
    restored = {kind: pipeline(image, output_type=kind).images for kind in ("pil", "np", "pt")}
    assert restored["np"].shape == (1, SIDE, SIDE, len(MODES[mode]))
    assert np.array_equal(restored["np"], restored["pt"].movedim(1, -1).numpy())
    assert np.array_equal((restored["np"][0] * 255).round().squeeze(), np.asarray(restored["pil"][0]))
    with pytest.raises(ValueError, match="channels, but have 2"):
        pipeline.encode(torch.zeros(1, 2, SIDE, SIDE))


def test_latent_diffusion_from_cached_latents_generates_the_mode(trained, discs, tmp_path):
    mode, autoencoder = trained
    forget_accelerate()
    data = ("--train_data_dir", str(discs), "--image_mode", mode, "--vae", str(autoencoder))
    latents = tmp_path / "latents"
    assert not precompute_latents.main([*data, "--resolution", str(SIDE), "--output_dir", str(latents)])
    assert json.loads((latents / "cache.json").read_text())["transform"].endswith(f" {mode}")
    folder = tmp_path / "run"
    measured = ("--evaluation_epochs", "1", "--memorization_epochs", "1", "--evaluation_extractor_resolution", "32")
    assert run(train_latent_diffusion, folder, *UNET, *data, "--latent_cache", str(latents), *measured) == 0
    pipeline = load_pipeline(folder)
    (image,) = pipeline(num_inference_steps=2, generator=0).images
    assert (image.mode, image.size) == (MODES[mode], (SIDE, SIDE))
    with Image.open(folder / "pipeline/samples.png") as grid:
        assert grid.mode == "RGB"
    sample.main(["--model", str(folder), "--output", f"{tmp_path}/drawn/", "--num_inference_steps", "2"])
    drawn = list((tmp_path / "drawn").iterdir())
    assert drawn
    for file in drawn:
        with Image.open(file) as written:
            assert written.mode == MODES[mode]
    results = tmp_path / "results.json"
    flags = ("--num_images", "8", "--num_inference_steps", "2", "--extractor_resolution", "32", "--cpu_threads", "1")
    forget_accelerate()
    evaluate.main(["--model", str(folder), "--output", str(results), "--split", "train", *flags])
    assert results.is_file()


def test_an_autoencoder_of_another_mode_is_refused(trained, discs, tmp_path):
    mode, autoencoder = trained
    channels = len(MODES[mode])
    with pytest.raises(UserError, match=rf"encodes images with {channels} channels \({mode}\).*--image_mode rgb has 3"):
        run(train_latent_diffusion, tmp_path, *UNET, "--train_data_dir", str(discs), "--vae", str(autoencoder))


@pytest.mark.parametrize("mode", list(MODES))
def test_a_transformer_denoises_the_pixels_of_the_mode(discs, tmp_path, mode):
    data = ("--train_data_dir", str(discs), "--image_mode", mode, "--vae", "pixels", "--prediction_type")
    assert run(train_latent_diffusion, tmp_path / "run", *UNET, *TRANSFORMER, *data, "flow_prediction") == 0
    pipeline = load_pipeline(tmp_path / "run")
    images = pipeline(num_inference_steps=2, generator=0, output_type="np").images
    assert images.shape == (1, SIDE, SIDE, len(MODES[mode]))
    assert pipeline(num_inference_steps=2, generator=0).images[0].mode == MODES[mode]
    assert load_vae(str(tmp_path / "run"), mode).config.latent_channels == len(MODES[mode])
    with pytest.raises(UserError, match=f"encodes images with {len(MODES[mode])} channels"):
        load_vae(str(tmp_path / "run"))


def test_what_takes_only_colour_images_says_so(discs, tmp_path):
    data = ("--train_data_dir", str(discs), "--image_mode", "rgba")
    with pytest.raises(UserError, match="--image_mode rgba works only in train_autoencoder.py"):
        parse_config(train_controlnet.Config, [*data, "--base_model", "x"])
    perceptual = ("--perceptual_weight", "0.1", "--perceptual_backbone", "microsoft/resnet-18")
    with pytest.raises(UserError, match="--perceptual_weight 0.1 compares colour images, but --image_mode is rgba"):
        parse_config(train_autoencoder.Config, [*data, *perceptual, "--recipe", "none"])
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"encodes images with 3 channels \(rgb\), but --image_mode rgba has 4"):
        run(train_latent_diffusion, tmp_path / "run", *UNET, *data, "--vae", str(tmp_path / "vae"))


def test_the_mode_of_a_run_cannot_be_changed(trained, discs, tmp_path):
    mode, folder = trained
    shutil.copytree(folder, tmp_path / "run", symlinks=True)
    with pytest.raises(UserError, match="image_mode"):
        run(train_autoencoder, tmp_path / "run", *AUTOENCODER, "--train_data_dir", str(discs), "--extra_epochs", "1")


@pytest.mark.slow
def test_transparent_emoji(tmp_path):
    try:
        make_emoji.find_font(None)
    except UserError:
        pytest.skip("no colour emoji font on this machine")
    folder = tmp_path / "emoji"
    flags = ("--resolution", str(SIDE), "--sequences", "none", "--transparent", "true")
    assert make_emoji.main(["--output_dir", str(folder), *flags]) == 0
    data = ("--dataset_name", str(folder), "--image_mode", "rgba", "--max_train_samples", "16")
    assert run(train_autoencoder, tmp_path / "run", *AUTOENCODER, *data) == 0
    font = make_emoji.open_font(make_emoji.find_font(None))
    emoji = make_emoji.draw(font, "😀", SIDE, transparent=True)
    assert emoji is not None
    assert emoji.getchannel("A").getextrema() == (0, 255)
    (restored,) = load_pipeline(tmp_path / "run")(emoji).images
    alpha, expected = (np.asarray(one.getchannel("A"), dtype=float) for one in (restored, emoji))
    assert np.corrcoef(alpha.ravel(), expected.ravel())[0, 1] > 0.9
    flags = (*UNET, "--vae", str(tmp_path / "run"))
    assert run(train_latent_diffusion, tmp_path / "diffusion", *flags, *data) == 0
    assert load_pipeline(tmp_path / "diffusion")(num_inference_steps=2, generator=0).images[0].mode == "RGBA"
