"""Mistakes of users: each gives one message that names it, exit status 2, no traceback, and no training.

Most cases call `main` in this process, as the entry point of the program does; one of each kind runs in a process of
its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_scripts import precompute_latents
from pipelines.tools.cli import entry_point
from tests.conftest import forget_accelerate
from tests.support.runs import ROOT, launch
from training import train_autoencoder, train_latent_diffusion


def refusal(script, words: list[str], capfd) -> str:
    """Run `script` with `words`, and return the error message with which it refuses them."""
    forget_accelerate()
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        entry_point(lambda: script.main(words))
    output = capfd.readouterr()
    assert left.value.code == 2, output.err
    assert "Traceback" not in output.out + output.err
    messages = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, output.err
    return output.err[output.err.index("error: ") :]


def nothing_was_trained(folder: Path) -> bool:
    return not list(folder.glob("checkpoints/step-*")) and not (folder / "metrics.csv").exists()


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """A folder of twelve images with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for row in range(12):
        pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{row}.png")
    write_captions(folder, [f"number {row}" for row in range(12)])
    return folder


def write_captions(folder: Path, captions: list[str | None]) -> None:
    lines = [json.dumps({"file_name": f"{row}.png", "text": text}) for row, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


SEGMENTATION = ("--heads", "[segmentation]", "--mask_column", "color_role")
# Flags that make an otherwise valid run fail, and the words that the message must contain.
AUTOENCODER = {
    "missing dataset": (["--dataset_name", "nowhere/at-all-of-it/x"], ["nowhere", "--dataset_name"]),
    "missing folder": (["--dataset_name", "", "--train_data_dir", "/nowhere"], ["/nowhere"]),
    "wrong column": (["--image_column", "imag"], ["imag", "'image'", "--image_column"]),
    "wrong split": (["--train_split", "trian"], ["trian", "train"]),
    "unknown flag": (["--learning_rat", "1"], ["--learning_rat", "learning_rate"]),
    "no number": (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
    "deepest feature map": (["--model.block_out_channels", "[16,16,16,16]"], ["deepest", "2×2", "3 levels"]),
    "resolution that does not halve": (["--resolution", "60"], ["60", "multiple"]),
    "odd latents": (
        ["--resolution", "72", "--scale_equivariance", "0.25"],
        ["--scale_equivariance", "9×9", "--resolution 72", "even", "use --resolution 80"],
    ),
    "small latents": (
        ["--resolution", "48", "--scale_equivariance", "0.25"],
        ["--scale_equivariance", "6×6", "--resolution 48", "at least 8", "use --resolution 64"],
    ),
    "groups": (["--model.norm_num_groups", "7"], ["--model.norm_num_groups 7"]),
    "no channels": (["--model.block_out_channels", "[]"], ["--model.block_out_channels"]),
    "no patches": (["--model.patch_size", "0"], ["--model.patch_size is 0"]),
    "a beta": (["--adam_beta2", "1"], ["--adam_beta2 is 1"]),
    "step rules": (["--lr_step_rules", "fast:slow"], ["--lr_step_rules", "fast:slow"]),
    "batch larger than the dataset": (["--train_batch_size", "64"], ["larger than the data set", "--train_batch_size"]),
    "nothing to learn from": (["--l1_weight", "0"], ["--l1_weight"]),
    "no backbone": (["--perceptual_weight", "1"], ["--perceptual_backbone"]),
    "backbone that is none": (["--perceptual_weight", "1", "--perceptual_backbone", "/nowhere"], ["/nowhere"]),
    "patches for a stock class": (["--model.class_name", "AutoencoderKL"], ["--model.patch_size 4"]),
    "no masks": (["--heads", "[segmentation]"], ["'mask'", "--mask_column"]),
    "masks that do not hold classes": ([*SEGMENTATION, "--mask_column", "text_mask"], ["'text_mask'", "at least two"]),
    "mask ids beyond the head": ([*SEGMENTATION, "--num_mask_classes", "3"], ["'color_role'", "beyond the 3 classes"]),
    "too few names": ([*SEGMENTATION, "--num_mask_classes", "6", "--mask_class_names", "[a,b]"], ["2 names", "is 6"]),
    "unknown head": (["--heads", "[segmentaton]"], ["--heads", "segmentaton"]),
    "no labels": (["--heads", "[classification]", "--label_column", "genre"], ["'genre'", "--label_column"]),
    "heads of a stock class": (
        [*SEGMENTATION, "--model.class_name", "AutoencoderKL", "--model.patch_size", "1"],
        ["--heads '[segmentation]'", "MultiHeadAutoencoderKL"],
    ),
    "learned weights of one loss": (["--learned_loss_weights", "true"], ["--learned_loss_weights", "--heads"]),
    "disk too small": (["--checkpoints_total_limit", "1000000000"], ["GiB free", "--checkpoints_total_limit"]),
    "folder not writable": (["--output_dir", "/proc/halftone"], ["/proc/halftone", "--output_dir"]),
}
DIFFUSION = {
    "no vae": (["--vae", "/nowhere"], ["/nowhere", "--vae"]),
    "no tokenizer": (["--tokenizer", "/nowhere"], ["/nowhere", "--tokenizer"]),
    "wrong caption column": (["--caption_column", "caption"], ["caption", "--caption_column"]),
    "wrong label column": (["--condition_on", "[label]", "--label_column", "lable"], ["lable", "'label'"]),
    "unknown condition": (["--condition_on", "[captoin]"], ["captoin", "'caption'"]),
    "deepest feature map": (["--model.block_out_channels", "[16,16,16]"], ["deepest", "use 2 levels"]),
    "no width": (["--text_encoder.hidden_size", "0"], ["--text_encoder.hidden_size is 0"]),
    "dropout": (["--model.dropout", "-1"], ["--model.dropout is -1"]),
    "heads": (["--text_encoder.num_attention_heads", "3"], ["--text_encoder.num_attention_heads 3"]),
    "zero SNR with epsilon": (["--prediction_type", "epsilon", "--rescale_betas_zero_snr", "true"], ["v_prediction"]),
    "unknown prediction type": (["--prediction_type", "epsilom"], ["epsilom", "'epsilon'"]),
    "no cache": (["--latent_cache", "/nowhere"], ["/nowhere", "precompute_latents.py"]),
    "init from nothing": (["--init_from", "/nowhere"], ["/nowhere"]),
    "batch larger than the dataset": (["--train_batch_size", "64"], ["larger than the data set", "--train_batch_size"]),
}


@pytest.mark.parametrize("name", AUTOENCODER)
def test_train_autoencoder(tmp_path, autoencoder_flags, capfd, name):
    words, named = AUTOENCODER[name]
    folder = tmp_path / "run"
    message = refusal(train_autoencoder, [*autoencoder_flags, "--output_dir", str(folder), *words], capfd)
    assert [word for word in named if word not in message] == [], message
    assert nothing_was_trained(folder)


@pytest.mark.parametrize("name", DIFFUSION)
def test_train_latent_diffusion(tmp_path, diffusion_flags, capfd, name):
    words, named = DIFFUSION[name]
    folder = tmp_path / "run"
    message = refusal(train_latent_diffusion, [*diffusion_flags, "--output_dir", str(folder), *words], capfd)
    assert [word for word in named if word not in message] == [], message
    assert nothing_was_trained(folder)


@pytest.mark.parametrize("kind", ["broken", "not an image", "empty"])
def test_a_broken_image_is_named(tmp_path, image_folder, autoencoder_flags, capfd, kind):
    file = image_folder / "7.png"
    file.write_bytes({"broken": file.read_bytes()[:200], "not an image": b"hello", "empty": b""}[kind])
    words = [*autoencoder_flags, "--dataset_name", "", "--train_data_dir", str(image_folder)]
    message = refusal(train_autoencoder, [*words, "--output_dir", str(tmp_path / "run")], capfd)
    assert "7.png" in message
    assert "--on_bad_sample skip" in message
    assert nothing_was_trained(tmp_path / "run")
    forget_accelerate()
    skipping = [*words, "--on_bad_sample", "skip", "--num_train_epochs", "1", "--output_dir", str(tmp_path / "run")]
    assert train_autoencoder.main(skipping) == 0


@pytest.mark.parametrize("caption", ["", "  ", None])
def test_an_empty_caption_is_named(tmp_path, image_folder, diffusion_flags, capfd, caption):
    write_captions(image_folder, [caption if row == 5 else f"number {row}" for row in range(12)])
    words = [*diffusion_flags, "--dataset_name", "", "--train_data_dir", str(image_folder)]
    message = refusal(train_latent_diffusion, [*words, "--output_dir", str(tmp_path / "run")], capfd)
    assert "row 5" in message
    assert "caption" in message
    assert nothing_was_trained(tmp_path / "run")


def test_an_unknown_key_in_the_file_is_named_with_the_nearest(tmp_path, autoencoder_flags, capfd):
    (tmp_path / "c.yaml").write_text("model:\n  latent_chanels: 4\n")
    words = [*autoencoder_flags, "--output_dir", str(tmp_path / "run"), "--config", str(tmp_path / "c.yaml")]
    message = refusal(train_autoencoder, words, capfd)
    assert "model.latent_chanels" in message
    assert "did you mean 'model.latent_channels'" in message


def test_a_cache_of_another_vae_is_refused(tmp_path, posters, autoencoder, autoencoder_flags, diffusion_flags, capfd):
    other = tmp_path / "other"
    forget_accelerate()
    train_autoencoder.main([*autoencoder_flags, "--seed", "1", "--max_train_steps", "1", "--output_dir", str(other)])
    forget_accelerate()
    data = ["--dataset_name", str(posters), "--resolution", "64", "--vae", str(other)]
    precompute_latents.main([*data, "--output_dir", str(tmp_path / "cache")])
    words = [*diffusion_flags, "--latent_cache", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")]
    message = refusal(train_latent_diffusion, words, capfd)
    assert "VAE" in message
    assert "precompute_latents.py" in message
    assert nothing_was_trained(tmp_path / "run")


@pytest.fixture
def finished(tmp_path, autoencoder) -> Path:
    shutil.copytree(autoencoder, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_a_damaged_checkpoint_named_by_its_path(finished, autoencoder_flags, capfd):
    (damaged,) = (finished / "checkpoints").glob("step-*")
    weights = damaged / "phase_autoencoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    words = [*autoencoder_flags, "--output_dir", str(finished), "--num_train_epochs", "2"]
    message = refusal(train_autoencoder, [*words, "--resume_from_checkpoint", str(damaged)], capfd)
    assert "damaged" in message
    assert "phase_autoencoder.safetensors" in message


def test_another_model_on_resume(finished, autoencoder_flags, capfd):
    words = [*autoencoder_flags, "--output_dir", str(finished), "--model.latent_channels", "8"]
    message = refusal(train_autoencoder, words, capfd)
    assert "--model" in message
    assert "--overwrite" in message


@pytest.mark.parametrize("script", ["train_autoencoder.py", "train_latent_diffusion.py"])
def test_as_a_process(tmp_path, script):
    done = launch(ROOT / "training" / script, "--output_dir", str(tmp_path / "run"), "--sed", "1")
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --sed; did you mean 'seed'? (--help_all lists them all)\n"
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_data_as_a_process(tmp_path, autoencoder_flags):
    flags = (*autoencoder_flags, "--output_dir", str(tmp_path / "run"), "--train_batch_size", "64")
    done = launch(ROOT / "training/train_autoencoder.py", *flags)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[-1:]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_mistake_is_reported_once_by_two_processes(tmp_path, autoencoder_flags):
    flags = (*autoencoder_flags, "--output_dir", str(tmp_path / "run"), "--train_batch_size", "64")
    done = launch(ROOT / "training/train_autoencoder.py", *flags, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
