"""A later start reuses what an earlier one found out about unchanged files; every change is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from pipelines.tools.cli import UserError
from training.data import source as data_source
from training.data.checks import require_clean
from training.data.fingerprints import dataset_fingerprint
from training.data.images import DataConfig, ImageDataset, load_split
from training.data.records import files_state
from training.engine.signals import Interrupted

ROWS = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for row in range(ROWS):
        Image.new("RGB", (16, 16), (30 * row, 0, 0)).save(path / f"{row}.png")
    write_captions(path, [f"picture {row}" for row in range(ROWS)])
    return path


def write_captions(folder: Path, captions: list[str]) -> None:
    lines = [json.dumps({"file_name": f"{row}.png", "text": text}) for row, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def start(folder: Path) -> ImageDataset:
    """Open the data as a new process does."""
    data_source._open_source.cache_clear()
    config = DataConfig(train_data_dir=str(folder), validation_fraction=0, resolution=16)
    return ImageDataset(load_split(config, "train", 0), config, captions=True)


def read(folder: Path) -> set[str]:
    """Return the names of the images that were read since `forget_reads`, by their access times."""
    return {file.name for file in folder.glob("*.png") if file.stat().st_atime_ns > file.stat().st_mtime_ns}


def forget_reads(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, ns=(1, file.stat().st_mtime_ns))  # an access time before the modification


@pytest.fixture
def access_times(folder: Path) -> None:
    forget_reads(folder)
    (folder / "0.png").read_bytes()
    if read(folder) != {"0.png"}:
        pytest.skip("this file system does not record when files are read")


def test_later_starts_do_not_read_the_images_again(folder, access_times):
    first = start(folder)
    require_clean(first)
    fingerprint = dataset_fingerprint(first)
    forget_reads(folder)
    second = start(folder)
    require_clean(second)
    assert dataset_fingerprint(second) == fingerprint
    assert second.dataset["text"][:] == first.dataset["text"][:]
    assert second.dataset["image"][:] == first.dataset["image"][:]
    assert read(folder) == set()


def test_a_change_of_any_file_is_noticed(folder):
    fingerprints = set()
    require_clean(start(folder))
    fingerprints.add(dataset_fingerprint(start(folder)))
    write_captions(folder, ["another", *(f"picture {row}" for row in range(1, ROWS))])
    assert start(folder).dataset["text"][0] == "another"
    fingerprints.add(dataset_fingerprint(start(folder)))
    Image.new("RGB", (16, 16), "blue").save(folder / "3.png")
    fingerprints.add(dataset_fingerprint(start(folder)))
    assert len(fingerprints) == 3
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"3.png"):
        require_clean(start(folder))
    (folder / "3.png").unlink()
    with pytest.raises(UserError, match=r"3.png"):
        require_clean(start(folder))


def test_bad_rows_are_named_at_every_start(folder):
    write_captions(folder, ["", *(f"picture {row}" for row in range(1, ROWS))])
    for _ in range(2):
        with pytest.raises(UserError, match=r"row 0 .*the caption is empty"):
            require_clean(start(folder))


def test_damaged_records_are_made_again(folder):
    import datasets

    require_clean(start(folder))
    expected = dataset_fingerprint(start(folder))
    records = list((Path(datasets.config.HF_DATASETS_CACHE) / "halftone").glob("*.json"))
    assert {file.name.split("-")[0] for file in records} >= {"imagefolder", "scan", "fingerprint"}
    for content in ("", "[1]", '{"train": ["/nowhere.arrow"]}', "\0"):
        for file in records:
            file.write_text(content)
        require_clean(start(folder))
        assert dataset_fingerprint(start(folder)) == expected


def test_the_state_covers_every_file_and_survives_loops(folder):
    states = [files_state(folder)]
    (folder / "sub").mkdir()
    (folder / "sub/x.txt").write_text("a")
    states.append(files_state(folder))
    (folder / "sub/loop").symlink_to(".")
    (folder / "self").symlink_to("self")
    (folder / "sub/x.txt").write_text("ab")
    states.append(files_state(folder))
    assert len(set(states)) == 3
    assert files_state(folder) == states[-1]


# --- requests to stop


def test_a_request_to_stop_is_heard_during_checks_and_fingerprints(folder):
    def poll() -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        require_clean(start(folder), poll=poll)
    with pytest.raises(Interrupted):
        dataset_fingerprint(start(folder), poll)
