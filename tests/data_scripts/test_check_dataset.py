"""Tests of check_dataset.py: all problems are listed by row in one pass; duplicates are not problems."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from data_scripts import check_dataset
from pipelines.tools.cli import UserError
from tests.conftest import ROOT


def make(folder: Path, rows: int = 8, masks: bool = False) -> Path:
    """Make an imagefolder in which image 5 is a copy of image 1."""
    generator = np.random.default_rng(0)
    lines = []
    for row in range(rows):
        for kind, shape in (("images", (12, 16, 3)), *([("masks", (12, 16))] if masks else [])):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / kind / f"{row}.png")
        line = {"file_name": f"images/{row}.png", "text": f"number {row}", "label": "ab"[row % 2]}
        lines.append({**line, "mask_file_name": f"masks/{row}.png"} if masks else line)
    (folder / "images" / "5.png").write_bytes((folder / "images" / "1.png").read_bytes())
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def check(folder: Path, *more: str) -> int | None:
    return check_dataset.main(["--train_data_dir", str(folder), "--resolution", "16", *more])


def test_a_clean_dataset_passes(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert check(make(tmp_path / "data", masks=True)) == 0
    output = capsys.readouterr().out
    assert "No problems" in output
    assert "16×12" in output
    assert "2 to 2, median 2" in output
    assert "8 distinct" in output
    assert "train: 2 classes: a 4, b 4" in output
    assert "rows 5 = 1" in output
    assert "8 images are not square" in output
    assert "8 images are below 16 px" in output
    assert "will be enlarged" in output


def test_all_problems_are_listed_in_one_pass(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = make(tmp_path / "data", masks=True)
    (folder / "images" / "2.png").write_bytes((folder / "images" / "2.png").read_bytes()[:60])
    Image.new("L", (8, 8)).save(folder / "masks" / "3.png")
    (folder / "masks" / "4.png").write_bytes(b"broken")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[6]["text"] = " "
    lines[7]["text"], lines[7]["label"] = None, None
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert check(folder) == 2
    output = capsys.readouterr().out
    assert "6 problems:" in output
    listed = [line.strip() for line in output.splitlines() if line.startswith("  train row")]
    assert [(line.split()[2], line.split("column '")[1].split("'")[0]) for line in listed] == [
        ("2", "image"),
        ("3", "mask"),
        ("4", "mask"),
        ("6", "text"),
        ("7", "text"),
        ("7", "label"),
    ]
    assert "its size is 8×8, but its image is 16×12" in listed[1]
    assert "2.png" in listed[0]
    assert check(folder, "--max_listed", "2") == 2
    assert "and 4 more" in capsys.readouterr().out


def test_labels_out_of_range_and_images_in_two_splits(tmp_path: Path, capsys: pytest.CaptureFixture):
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"), label=datasets.Value("int64"))
    images = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(4)]
    for split, part, labels in (("train", images[:3], [0, 1, -1]), ("validation", images[2:], [1, 7])):
        columns = {"image": part, "text": ["a"] * len(part), "label": labels}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    assert check_dataset.main(["--dataset_name", str(tmp_path), "--resolution", "16"]) == 2
    output = capsys.readouterr().out
    assert "train row 2, column 'label': label -1 is not one of the 2 classes" in output
    assert "validation row 1, column 'label': label 7 is not one of the 2 classes (0, 1)" in output
    assert "1 images are in both train and validation (rows 2 = 0)" in output
    assert check_dataset.main(["--dataset_name", str(tmp_path), "--splits", "[validation]"]) == 2


def test_the_process_exits_2_without_a_traceback(tmp_path: Path):
    folder = make(tmp_path / "data")
    (folder / "images" / "0.png").write_bytes(b"")
    command = [sys.executable, str(ROOT / "data_scripts" / "check_dataset.py"), "--train_data_dir", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "row 0" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr


def test_files_that_are_left_out_are_listed_and_are_not_called_no_problem(tmp_path: Path):
    """As in a terminal: 18 images in classes of mixed formats, one with the name of a split, and three other files."""
    for name in ("bus", "car", "train"):
        for i, suffix in enumerate(("png", "jpg", "webp", "bmp", "tif", "gif")):
            (tmp_path / "pics" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (9 * i, len(name), 0)).save(tmp_path / f"pics/{name}/{i}.{suffix}")
    command = [sys.executable, str(ROOT / "data_scripts/check_dataset.py"), "--train_data_dir", str(tmp_path / "pics")]
    for name in ("bus/a.psd", "bus/b", "notes.docx"):
        (tmp_path / "pics" / name).write_bytes((tmp_path / "pics/bus/0.png").read_bytes() if name == "bus/b" else b"")
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for sentence in (
        "pics contains 21 files. Images by split: train 18.",
        "Classes by folder: bus 6, car 6, train 6.",
        "The folder train has the name of a split, but is read like any other folder",
        "Left out: images in formats that are not read: 1 (bus/a.psd); convert them to PNG or JPEG.",
        "Left out: images without the extension of an image: 1 (bus/b);",
        "Left out: other files: 1 (notes.docx).",
        "18 images are below 64 px",
        "Every row can be trained on. Files left out (listed above): 2.",
    ):
        assert sentence in run.stdout
    assert "No problems" not in run.stdout


def test_mistakes_are_user_errors(tmp_path: Path):
    folder = make(tmp_path / "data")
    with pytest.raises(UserError, match="no column 'masks'"):
        check(folder, "--mask_column", "masks")
    with pytest.raises(UserError, match="no split 'tests'"):
        check(folder, "--splits", "[tests]")
    with pytest.raises(UserError, match="--image_column"):
        check(folder, "--image_column", "picture")


def test_the_shared_dataset_is_clean(shared_dir: Path, capsys: pytest.CaptureFixture):
    arguments = ["--train_data_dir", str(shared_dir / "data" / "noto_emoji"), "--resolution", "128"]
    assert check_dataset.main(arguments) == 0
    assert "2,232" in capsys.readouterr().out
