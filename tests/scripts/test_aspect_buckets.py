"""Training on images that are not square, as users start it: `--aspect_buckets true`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from data_scripts import precompute_latents, train_tokenizer
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.support.rectangles import draw_rectangles
from tests.support.runs import ROOT, assert_same_state, launch, relative_difference, rows, sigterm_in_step
from training import train_autoencoder, train_controlnet, train_latent_diffusion
from training.core.draws import SampleKey
from training.core.layout import BatchLayout
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.data.aspect_buckets import AspectBuckets
from training.data.companions import control_of
from training.data.images import DataConfig, ImageDataset, load_split
from training.engine.loading import MicroBatches
from training.evaluation.data import EvaluationDataConfig, open_evaluation_data, run_settings
from training.metrics.generators import SamplingConfig, generator_of, native_size

UPRIGHT, WIDE, SQUARE = (60, 90), (90, 60), (64, 64)
SIZES = [UPRIGHT] * 11 + [WIDE] * 6 + [SQUARE] * 5 + [(200, 50)] * 2
COMMON = (
    *("--report_to", "none", "--cpu_threads", "1", "--resolution", "32", "--logging_steps", "1", "--recipe", "none"),
    *("--aspect_buckets", "true", "--train_batch_size", "4", "--lr_warmup_steps", "0", "--learning_rate", "1e-3"),
    *("--checkpointing_epochs", "0"),
)
TRANSFORMER = (
    *("--denoiser", "transformer", "--vae", "pixels", "--prediction_type", "flow_prediction"),
    *("--transformer.patch_size", "4", "--transformer.hidden_size", "32", "--transformer.num_layers", "2"),
    *("--transformer.num_attention_heads", "2", "--transformer.bottleneck_size", "16"),
    *("--text_encoder.hidden_size", "16", "--text_encoder.num_attention_heads", "2"),
    *("--text_encoder.num_hidden_layers", "1", "--num_previews", "2", "--preview_inference_steps", "2"),
)
AUTOENCODER = (
    *("--model.block_out_channels", "[16,16]", "--model.norm_num_groups", "8", "--model.latent_channels", "4"),
    *("--model.patch_size", "1"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return draw_rectangles(tmp_path_factory.mktemp("rectangles") / "images", SIZES)


@pytest.fixture(scope="module")
def words(folder) -> list[str]:
    """Flags of a latent diffusion model."""
    tokenizer = folder.with_name("tokenizer")
    data = ["--train_data_dir", str(folder)]
    train_tokenizer.main([*data, "--output_dir", str(tokenizer), "--model", "word_level"])
    return [*COMMON, *TRANSFORMER, *data, "--tokenizer", str(tokenizer)]


def train(folder: Path, words, *more: str) -> Path:
    forget_accelerate()
    assert train_latent_diffusion.main([*words, "--output_dir", str(folder), *more]) == 0
    return folder


def test_a_model_of_upright_images_draws_upright_images(tmp_path, words, capsys):
    """Two thirds of the width, and again after loading; other sizes can be asked for."""
    run = train(tmp_path / "run", words, "--num_train_epochs", "2")
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline", trust_remote_code=True)
    assert pipeline.transformer.config.sample_size == [40, 28]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a red disc", "a blue disc"], num_inference_steps=2).images
    assert [image.size for image in images] == [(28, 40)] * 2
    assert pipeline("a red disc", num_inference_steps=2, height=32, width=48).images[0].size == (48, 32)
    assert "40×28: 10 images" in (run / "run.log").read_text()
    assert rows(run)[-1]["val_loss"]


def test_every_image_is_trained_on_in_every_epoch(words):
    config = parse_config(train_latent_diffusion.Config, [*words, "--validation_fraction", "0"])
    stage = train_latent_diffusion.LatentDiffusionStage(config, StageContext())
    batches = MicroBatches(
        stage.training_set,
        BatchLayout(4),
        seed=0,
        strata=None,
        num_workers=0,
        device=torch.device("cpu"),
    )
    steps = 3 + 2 + 2
    for epoch in range(3):
        seen = set()
        for (batch,) in batches.steps(epoch * steps, (epoch + 1) * steps):
            assert batch["pixel_values"].shape[1:] in ((3, 40, 28), (3, 28, 40), (3, 32, 32))
            seen |= set(batch["index"].tolist())
        assert seen == set(range(len(SIZES)))


def test_resumed_equals_uninterrupted(tmp_path, words, monkeypatch):
    steps = ("--max_train_steps", "9", "--validation_steps", "4")
    whole = train(tmp_path / "whole", words, *steps)
    with sigterm_in_step(5, train_latent_diffusion.LatentDiffusionPhase, monkeypatch):
        forget_accelerate()
        assert train_latent_diffusion.main([*words, "--output_dir", str(tmp_path / "parts"), *steps]) == 75
    assert_same_state(train(tmp_path / "parts", words, *steps), whole)


@pytest.mark.slow
def test_any_split_of_a_global_batch_trains_the_same_model(tmp_path, words):
    """Twenty steps in float64: one process with batches of four, and two that accumulate two batches of one."""
    steps = ("--max_train_steps", "20", "--validation_epochs", "0", "--preview_epochs", "0")
    script = ROOT / "tests/support/rectangles.py"
    for name, batch, accumulation, processes in (("one", 4, 1, 1), ("two", 1, 2, 2), ("other", 2, 2, 1)):
        shape = ("--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation))
        flags = [*words, *steps, *shape, "--output_dir", str(tmp_path / name)]
        done = launch(script, *flags, processes=processes)
        assert done.returncode == 0, done.stderr
    for name in ("two", "other"):
        difference = relative_difference(tmp_path / name, tmp_path / "one")
        print(f"{name}: {difference:.1e}")
        assert difference < 1e-10


def test_an_autoencoder_of_rectangles_reconstructs_rectangles(tmp_path, folder):
    forget_accelerate()
    flags = [*COMMON, *AUTOENCODER, "--train_data_dir", str(folder), "--scale_equivariance", "0.1"]
    flags += ["--num_train_epochs", "1", "--output_dir", str(tmp_path / "run")]
    assert train_autoencoder.main(flags) == 0
    assert float(rows(tmp_path / "run")[-1]["val_psnr"]) > 0
    images = load_pipeline(tmp_path / "run")(torch.rand(2, 3, 24, 40)).images
    assert images[0].size == (40, 24)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--resolution", "8"), "at --resolution 8 all images would be squares"),
        (("--balance_by", "text"), "--balance_by text and --aspect_buckets true cannot be combined"),
        (("--caption_prior.hidden_size", "8"), "--caption_prior.hidden_size 8 predicts latents of one size"),
    ],
)
def test_what_does_not_fit_is_refused(words, more, message, tmp_path, capsys):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", words, *more)


@pytest.fixture(scope="module")
def latents(tmp_path_factory, folder) -> tuple[str, ...]:
    """Flags of a U-Net on latents of rectangles; the autoencoder is trained on squares."""
    runs = tmp_path_factory.mktemp("latents")
    forget_accelerate()
    data = ("--train_data_dir", str(folder))
    vae = (*COMMON, *AUTOENCODER, *data, "--aspect_buckets", "false", "--num_train_epochs", "1")
    assert train_autoencoder.main([*vae, "--output_dir", str(runs / "vae")]) == 0
    return (*data, "--vae", str(runs / "vae"))


UNET = (
    *("--model.block_out_channels", "[16,32]", "--model.norm_num_groups", "8", "--model.attention_head_dim", "8"),
    *("--model.layers_per_block", "1", "--condition_on", "[]", "--num_previews", "2", "--preview_inference_steps", "2"),
)


def test_latents_of_rectangles_are_those_that_are_encoded_in_each_step(tmp_path, latents):
    """A cache with several shards for each size gives the same run as the images themselves."""
    cache = tmp_path / "cache"
    flags = (*latents, "--resolution", "32", "--aspect_buckets", "true", "--bucket_images", "4", "--shard_rows", "4")
    assert not precompute_latents.main([*flags, "--output_dir", str(cache)])
    words = (*COMMON, *UNET, *latents, "--max_train_steps", "6", "--validation_steps", "3")
    images = train(tmp_path / "images", words)
    cached = train(tmp_path / "cached", words, "--latent_cache", str(cache))
    assert relative_difference(cached, images) < 1e-5
    assert float(rows(cached)[-1]["val_loss"]) == pytest.approx(float(rows(images)[-1]["val_loss"]), rel=1e-4)
    pipeline = load_pipeline(cached)
    stock = UNet2DConditionModel.from_pretrained(cached / "pipeline/unet")
    assert stock.config.sample_size == pipeline.unet.config.sample_size == [20, 14]
    assert pipeline(num_inference_steps=2).images[0].size == (28, 40)
    with pytest.raises(UserError, match=r"center-to-aspect-bucket-crop lanczos', this run has"):
        train(tmp_path / "squares", words, "--latent_cache", str(cache), "--aspect_buckets", "false")
    deeper = ("--model.block_out_channels", "[16,16,32]", "--model.attention_levels", "[]")
    with pytest.raises(UserError, match=r"multiples of 8 and at least 32; make it again with --bucket_divisor 8"):
        train(tmp_path / "deeper", words, "--latent_cache", str(cache), *deeper)


def test_a_controlnet_of_rectangles(tmp_path, latents, folder):
    """Masks are cropped with their images, and previews and measurements have the size of their masks."""
    base = train(tmp_path / "base", (*COMMON, *UNET, *latents, "--max_train_steps", "2"))
    flags = [*COMMON, *latents[:2], "--base_model", str(base), "--max_train_steps", "4", "--validation_steps", "2"]
    flags += ["--num_previews", "2", "--preview_inference_steps", "2", "--memorization_epochs", "1"]
    flags += ["--evaluation_images", "8", "--evaluation_inference_steps", "2", "--output_dir", str(tmp_path / "run")]
    forget_accelerate()
    assert train_controlnet.main(flags) == 0
    last = rows(tmp_path / "run")[-1]
    assert last["val_loss_shuffled_control"]
    assert last["eval_copy_rate"]
    pipeline = load_pipeline(tmp_path / "run")
    control = Image.open(folder / "000_control.png").convert("RGB").resize((28, 40))
    assert pipeline(control_image=control, height=40, width=28, num_inference_steps=2).images[0].size == (28, 40)


def test_masks_are_cropped_with_their_rectangles(folder):
    config = DataConfig(train_data_dir=str(folder), validation_fraction=0.0, resolution=32, center_crop=False)
    control = control_of("conditioning_image", 0)
    data = ImageDataset(load_split(config, "train", 0), config, captions=False, control=control)
    data.put_in_buckets(AspectBuckets(((40, 28), (28, 40))))
    for row in range(len(SIZES)):
        item = data[SampleKey(row, row)]
        disc = (item["pixel_values"].amax(0) + 1) / 2 > 0.6
        assert item["conditioning_pixel_values"].shape == item["pixel_values"].shape
        assert ((item["conditioning_pixel_values"][0] > 0.5) == disc).float().mean() > 0.97


def test_a_run_and_an_evaluation_measure_images_of_the_default_size(tmp_path, words):
    """Generated and real images have the size that the pipeline draws by default."""
    measured = ("--max_train_steps", "4", "--evaluation_steps", "4", "--memorization_epochs", "1")
    some = ("--evaluation_images", "8", "--evaluation_inference_steps", "2", "--evaluation_extractor_resolution", "32")
    run = train(tmp_path / "run", words, *measured, *some, "--validation_fraction", "0.4")
    assert rows(run)[-1]["eval_copy_rate"]
    pipeline = load_pipeline(run)
    height, width = native_size(pipeline)
    assert height != width
    generator = generator_of(pipeline, SamplingConfig())
    data = open_evaluation_data(EvaluationDataConfig(), run_settings(str(run)), generator)
    for real in data.splits.values():
        assert {image.size for image in real.images(range(len(real)))} == {(width, height)}


def test_a_dry_run_shows_the_sizes(tmp_path, words, capsys):
    train(tmp_path / "run", words, "--dry_run", "true")
    printed = capsys.readouterr()
    assert "40×28: 10 images" in printed.out + printed.err
    assert "23 images, 7 steps per epoch" in printed.out


def test_images_that_are_not_square_are_noticed(tmp_path, words, folder):
    squares = ("--max_train_steps", "1", "--aspect_buckets", "false")
    train(tmp_path / "run", words, *squares)
    assert "% of their pixels are cut off; --aspect_buckets true" in (tmp_path / "run/run.log").read_text()
    other = draw_rectangles(tmp_path / "squares", [(64, 60)] * 8)
    train(tmp_path / "other", words, *squares, "--train_data_dir", str(other))
    assert "cut off" not in (tmp_path / "other/run.log").read_text()
