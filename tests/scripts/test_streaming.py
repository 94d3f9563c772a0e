"""Training on shards as users start it, `--streaming true`: a resumed or split run is the same run, also on latents."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_scripts import precompute_latents
from tests.conftest import forget_accelerate
from tests.data.test_shards import MAKERS, SHARDS, tars
from tests.support.runs import ROOT, assert_same_state, launch, relative_difference, sigterm_in_step
from tests.support.tiny_models import tiny_vae
from training import train_latent_diffusion
from training.data.latent_cache.dataset import LatentCache
from training.data.shards import tables

FLAGS = (
    *("--report_to", "none", "--cpu_threads", "1", "--resolution", "16", "--logging_steps", "1", "--recipe", "none"),
    *("--streaming", "true", "--shuffle_buffer", "12", "--train_batch_size", "4", "--lr_warmup_steps", "0"),
    *(
        "--denoiser",
        "transformer",
        "--vae",
        "pixels",
        "--prediction_type",
        "flow_prediction",
        "--condition_on",
        "label",
    ),
    *("--transformer.patch_size", "4", "--transformer.hidden_size", "32", "--transformer.num_layers", "1"),
    *("--transformer.num_attention_heads", "2", "--transformer.bottleneck_size", "16"),
    *("--num_previews", "2", "--preview_inference_steps", "2", "--checkpointing_epochs", "0"),
)


def train(folder: Path, *flags: str) -> Path:
    forget_accelerate()
    assert train_latent_diffusion.main([*FLAGS, "--output_dir", str(folder), *flags]) == 0
    return folder


@pytest.mark.parametrize("kind", MAKERS)
def test_resumed_equals_uninterrupted(tmp_path, kind, monkeypatch):
    """Interrupted within the second epoch, with seven steps of four of 30 rows in each."""
    monkeypatch.setattr(tables, "BLOCK_ROWS", 4)
    data = ("--dataset_name", str(MAKERS[kind](tmp_path / "shards")), "--validation_fraction", "0")
    steps = (*data, "--max_train_steps", "16", "--preview_epochs", "0")
    whole = train(tmp_path / "whole", *steps)
    with sigterm_in_step(10, train_latent_diffusion.LatentDiffusionPhase, monkeypatch):
        forget_accelerate()
        flags = [*FLAGS, "--output_dir", str(tmp_path / "parts"), *steps]
        assert train_latent_diffusion.main(flags) == 75
    assert_same_state(train(tmp_path / "parts", *steps), whole)
    # Another order trains another model.
    other = train(tmp_path / "other", *steps, "--shuffle_buffer", "4")
    assert relative_difference(other, whole) > 1e-4


@pytest.mark.slow
def test_any_split_of_a_global_batch_trains_the_same_model(tmp_path):
    """Ten steps in float64 on tar files: one process with batches of four, and two with batches of two."""
    data = ("--dataset_name", str(tars(tmp_path / "shards")), "--max_train_steps", "10")
    for name, batch, processes in (("one", 4, 1), ("two", 2, 2)):
        flags = [*FLAGS, *data, "--preview_epochs", "0", "--output_dir", str(tmp_path / name)]
        script = ROOT / "tests/support/rectangles.py"
        done = launch(script, *flags, "--train_batch_size", str(batch), processes=processes)
        assert done.returncode == 0, done.stderr
    assert relative_difference(tmp_path / "two", tmp_path / "one") < 1e-10


def test_latents_of_streamed_images_are_those_of_the_unpacked_ones(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    folder = tars(tmp_path / "shards")
    prints = []
    for streaming in ("true", "false"):
        flags = [*("--dataset_name", str(folder)), *("--vae", str(tmp_path / "vae")), *("--resolution", "16")]
        flags += ["--output_dir", str(tmp_path / streaming), "--streaming", streaming, "--shard_rows", "4"]
        flags += ["--cpu_threads", "1", "--validation_fraction", "0", "--splits", "[train]"]
        assert precompute_latents.main(flags) == 0
        prints.append(LatentCache(tmp_path / streaming).fingerprint)
    assert prints[0] == prints[1]
    assert len(list((tmp_path / "shards").iterdir())) == 2 * SHARDS  # nothing was added to the data
