"""A training on a folder as people have it says in one line what was read and what was left out."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.scripts.conftest import COMMON, TINY_AUTOENCODER
from tests.support.runs import launch

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
