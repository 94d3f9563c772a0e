"""FSDP2 with real stages: two processes train the model of one, show previews, and export its pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.support.ranks import forked_ranks
from tests.support.runs import relative_difference
from training.core.scripts import script_module

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", ["latent_diffusion", "autoencoder"])
def test_two_processes_train_the_model_of_one(tmp_path, diffusion_flags, autoencoder_flags, stage):
    # Six images are two batches, one for each process.
    prompts = ("--preview_prompts", "[a red poster,a blue poster,red,blue,a poster,cream]", "--num_previews", "6")
    flags = (*diffusion_flags, *prompts) if stage == "latent_diffusion" else autoencoder_flags

    def train(folder: Path, accumulation: int) -> int:
        forget_accelerate()
        split = ("--train_batch_size", "4", "--gradient_accumulation_steps", str(accumulation))
        ending = ("--max_train_steps", "3", "--preview_steps", "2", "--output_dir", str(folder))
        return script_module(stage).main([*flags, *split, *ending])

    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, 2) == 0
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    forked_ranks(lambda: train(two, 1), tmp_path / "two.txt", 2, **sharded)
    assert "with FSDP2" in (two / "run.log").read_text(encoding="utf-8")
    for files in ("phase_*.safetensors", "ema.safetensors"):
        assert relative_difference(two, one, [files]) < 1e-3
    assert (two / "samples/step_00000002.png").is_file()
    assert load_pipeline(str(two)).components.keys() == load_pipeline(str(one)).components.keys()
    samples = two / "pipeline/samples.png"
    made_by_two = samples.read_bytes()
    shutil.rmtree(two / "pipeline")
    assert train(two, 2) == 0  # one process exports the same weights
    assert samples.read_bytes() == made_by_two
