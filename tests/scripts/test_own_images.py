"""A training on a folder as people have it says in one line what was read and what was left out."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.scripts.conftest import COMMON, TINY_AUTOENCODER
from tests.support.runs import ROOT, launch

FORMATS = ("png", "jpg", "webp", "bmp", "tif", "gif")


def test_classes_of_mixed_formats_one_of_which_has_the_name_of_a_split(tmp_path: Path):
    folder = tmp_path / "pics"
    for name in ("bus", "car", "train"):
        (folder / name).mkdir(parents=True)
        for i, suffix in enumerate(FORMATS):
            Image.new("RGB", (64, 64), (30 * i, 10 * len(name), 0)).save(folder / name / f"{i}.{suffix}")
    (folder / "bus/a.psd").write_bytes(b"8BPS")
    (folder / "notes.docx").write_bytes(b"PK")
    flags = (*COMMON, *TINY_AUTOENCODER, "--train_data_dir", str(folder), "--max_train_steps", "1")
    run = launch("training/train_autoencoder.py", *flags, "--output_dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    log = (tmp_path / "run/run.log").read_text(encoding="utf-8")
    line = next(line for line in log.splitlines() if "captions: none" in line)
    assert (
        f"{folder}: 18 in train; captions: none; 3 classes by folder. The folder train has the name of a split" in line
    )
    assert "Left out: images in formats that are not read: 1 (python data_scripts/check_dataset.py lists them)" in line
    assert "notes" not in line


def test_a_run_does_not_lie_in_the_folder_of_its_collection(tmp_path: Path):
    """`--output_dir runs/pics` for a folder `pics` is an error before anything is made; a folder in it is not."""
    (tmp_path / "pics").mkdir()
    for i in range(12):
        Image.new("RGB", (64, 64), (20 * i, 0, 0)).save(tmp_path / "pics" / f"{i}.png")
    script, data = ROOT / "training/train_latent_diffusion.py", ("--train_data_dir", "pics")
    refused = launch(script, *data, "--output_dir", "runs/pics/", cwd=tmp_path)
    assert refused.returncode == 2
    assert "name a folder in it, such as --output_dir runs/pics/my_run" in refused.stderr
    assert not (tmp_path / "runs").exists()
    planned = launch(script, *data, "--output_dir", "runs/pics/my_run", "--dry_run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr


def test_a_network_that_takes_only_squares_is_refused_before_its_autoencoder_is_trained(tmp_path: Path):
    (tmp_path / "pics").mkdir()
    for i in range(12):
        Image.new("RGB", (64, 96), (20 * i, 0, 0)).save(tmp_path / "pics" / f"{i}.png")
    flags = ("--train_data_dir", "pics", "--aspect_buckets", "true", "--denoiser", "unet", "--dry_run")
    script = ROOT / "training/train_latent_diffusion.py"
    refused = launch(script, *flags, "--model.block_out_channels", "[32,64]", cwd=tmp_path)
    assert refused.returncode == 2
    assert "at --resolution 64 all images would be squares" in refused.stderr
    assert launch(script, *flags, cwd=tmp_path).returncode == 0
