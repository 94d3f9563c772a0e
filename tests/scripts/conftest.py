"""Fixtures: forty real posters with their tokenizer, made once, and flags for tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_scripts import make_posters, train_tokenizer
from tests.conftest import forget_accelerate
from training import train_autoencoder

COMMON = ("--report_to", "none", "--cpu_threads", "1", "--resolution", "64", "--logging_steps", "1")
TINY_AUTOENCODER = (
    *("--model.block_out_channels", "[16,16]", "--model.norm_num_groups", "8", "--model.latent_channels", "4"),
    *("--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "2e-3"),
    *("--lr_warmup_steps", "0", "--recipe", "none"),
)
TINY_DIFFUSION = (
    *("--model.block_out_channels", "[16,32]", "--model.norm_num_groups", "8", "--model.attention_head_dim", "8"),
    *("--model.layers_per_block", "1", "--text_encoder.hidden_size", "16", "--text_encoder.num_attention_heads", "2"),
    *("--text_encoder.num_hidden_layers", "1", "--train_batch_size", "4", "--gradient_accumulation_steps", "2"),
    *("--learning_rate", "1e-3", "--lr_warmup_steps", "0", "--num_previews", "2", "--preview_inference_steps", "2"),
    *("--recipe", "none"),
)


@pytest.fixture(scope="session")
def posters(tmp_path_factory) -> Path:
    """32 for training, 4 for validation, 4 for tests."""
    folder = tmp_path_factory.mktemp("data") / "posters"
    shares = ("--validation_fraction", "0.1", "--test_fraction", "0.1")
    make_posters.main(["--output_dir", str(folder), "--num_posters", "40", "--num_workers", "1", *shares])
    return folder


@pytest.fixture(scope="session")
def tokenizer(posters) -> Path:
    folder = posters.with_name("tokenizer")
    train_tokenizer.main(["--dataset_name", str(posters), "--output_dir", str(folder), "--model", "word_level"])
    return folder


@pytest.fixture(scope="session")
def autoencoder_flags(posters) -> tuple[str, ...]:
    return (*COMMON, *TINY_AUTOENCODER, "--dataset_name", str(posters))


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory, autoencoder_flags) -> Path:
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "autoencoder"
    forget_accelerate()
    assert train_autoencoder.main([*autoencoder_flags, "--num_train_epochs", "1", "--output_dir", str(folder)]) == 0
    forget_accelerate()
    return folder


@pytest.fixture(scope="session")
def diffusion_flags(posters, tokenizer, autoencoder) -> tuple[str, ...]:
    inputs = ("--dataset_name", str(posters), "--tokenizer", str(tokenizer), "--vae", str(autoencoder))
    return (*COMMON, *TINY_DIFFUSION, *inputs)
