"""What W&B records of a real latent diffusion run: sample grids with captions, and the loss by noise level."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.support.runs import ROOT, launch, rows
from tests.support.wandb_files import wandb_history

pytestmark = pytest.mark.slow

BANDS = [f"val_loss_noise_{band}" for band in ("0_25", "25_50", "50_75", "75_100")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, diffusion_flags) -> Path:
    folder = tmp_path_factory.mktemp("dashboard") / "run"
    flags = ("--report_to", "wandb", "--max_train_steps", "4", "--validation_steps", "2", "--preview_steps", "2")
    done = launch(ROOT / "training/train_latent_diffusion.py", *diffusion_flags, *flags, "--output_dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_sample_grids_over_time_with_captions(run):
    logged = [row for row in wandb_history(run) if "samples/previews" in row]
    assert [row["step"] for row in logged] == [2, 4]
    for row in logged:
        images = row["samples/previews"]
        assert images["count"] == len(images["captions"]) == 2
        assert all("poster" in caption for caption in images["captions"])
        for name in images["filenames"]:
            (file,) = run.glob(f"wandb/offline-run-*/files/{name}")
            assert Image.open(file).size == (64, 64)


def test_the_loss_by_noise_level_is_a_group_of_its_own(run):
    validated = [row for row in wandb_history(run) if "validation/val_loss" in row]
    table = [row for row in rows(run) if row.get("val_loss")]
    assert len(validated) == len(table) == 2
    for logged, row in zip(validated, table, strict=True):
        found = [name for name in BANDS if row.get(name)]
        assert found
        for name in found:
            assert logged[f"loss_by_noise_level/{name}"] == float(row[name])
        assert min(float(row[n]) for n in found) <= float(row["val_loss"]) <= max(float(row[n]) for n in found)
