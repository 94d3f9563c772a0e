"""Archives of images: rows, captions, classes and the account are those of a folder; unsafe archives are refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pipelines.tools.cli import UserError
from tests.conftest import ROOT
from tests.data.test_image_folder import account_of, classes_of, config_of, draw
from training.core.draws import SampleKey
from training.data import archives
from training.data.images import ImageDataset, load_split


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Unpack into an own folder, which can be deleted and looked at."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def packed(folder: Path, name: str) -> Path:
    """Return an archive of a folder, whose format is that of its name, beside the folder."""
    file = folder.parent / name
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if name.lower().endswith(".zip"):
        with zipfile.ZipFile(file, "w") as archive:
            for path in paths:
                archive.write(path, path.relative_to(folder))
    else:
        compression = {"tgz": "gz", "tar": "", "xz": "xz", "bz2": "bz2", "gz": "gz"}[name.rpartition(".")[2].lower()]
        with tarfile.open(file, f"w:{compression}") as archive:
            for path in paths:
                archive.add(path, path.relative_to(folder))
    shutil.rmtree(folder)
    return file


def with_texts(folder: Path, *names: str) -> Path:
    draw(folder, *names)
    for name in names:
        (folder / name).with_suffix(".txt").write_text(f"a {Path(name).stem}")
    return folder


def captions_of(source: Path, **settings: object) -> list[str]:
    return sorted(load_split(config_of(source, **settings), "train", 0)["text"])


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "A.ZIP", "a.tar.xz", "a.tar.bz2"])
@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_an_archive_is_read_like_a_folder(tmp_path, name, flag):
    archive = packed(draw(tmp_path / "pics", "cat/1.png", "cat/2.jpg", "dog/1.png"), name)
    assert classes_of(archive, **{"train_data_dir": None, flag: str(archive)}) == {"cat": 2, "dog": 1}


@pytest.mark.parametrize("top", ["", "photos/"])
def test_captions_of_an_archive(tmp_path, top):
    texts = packed(with_texts(tmp_path / "texts", f"{top}1.png", f"{top}2.png"), "texts.zip")
    assert captions_of(texts) == ["a 1", "a 2"]
    table = draw(tmp_path / "table", f"{top}1.png", f"{top}2.png")
    (table / top / "metadata.csv").write_text("file_name,text,label\n1.png,one,1985\n2.png,two,2020\n")
    packed_table = packed(table, "table.tar")
    assert captions_of(packed_table) == ["one", "two"]
    assert classes_of(packed_table) == {"1985": 1, "2020": 1}


def test_every_file_of_an_archive_is_accounted_for(tmp_path):
    folder = with_texts(tmp_path / "pics", "train/1.png", "train/2.png", "test/3.png")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX/1.png").write_bytes(b"resource fork")
    text = account_of(packed(folder, "pics.zip"))
    assert "contains 8 files. Images by split: test 1, train 2." in text
    assert "Captions: text files beside the images." in text
    assert "images in formats that are not read: 1 (notes.pdf)" in text
    assert "hidden files: 1" in text
    assert "Archives are unpacked in " in text


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_archives_in_a_folder(tmp_path, suffix):
    """Images of the same name in two archives are two images, and the names of archives are not classes."""
    folder = with_texts(tmp_path / "pics", "loose.png")
    for number in range(2):
        packed(with_texts(folder / "part", "same.png", f"{number}.png"), f"part{number}.{suffix}")
    for flag in ("train_data_dir", "dataset_name"):
        flags = {"train_data_dir": None, flag: str(folder)}
        assert captions_of(folder, **flags) == ["a 0", "a 1", "a loose", "a same", "a same"]
    assert "Classes by folder: none." in account_of(folder)
    assert "Nothing is left out." in account_of(folder)
    rows = load_split(config_of(folder), "train", 0)
    assert len({rows[i]["image"].tobytes() for i in range(5)}) == 4  # images of the same name have the same colour


def test_archives_of_classes_and_splits_in_a_folder(tmp_path):
    folder = tmp_path / "pics"
    for split, images in {"train": ["cat/1.png", "dog/1.png"], "test": ["cat/2.png"]}.items():
        packed(draw(folder / "part", *images), f"{split}.zip")
    assert classes_of(folder) == {"cat": 1, "dog": 1}
    assert len(load_split(config_of(folder), "test", 0)) == 1


def shard(file: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(file, "w") as archive:
        for key, parts in samples.items():
            for suffix, content in parts.items():
                info = tarfile.TarInfo(f"./{key}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def image_bytes(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 9, 9)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("captions", ["txt", "json"])
def test_shards_of_webdataset(tmp_path, captions):
    """Keys are repeated in the shards, as some programs number them in each shard from 0."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        samples = {}
        for key in range(2):
            text = f"caption {number} {key}"
            content = text if captions == "txt" else json.dumps({"caption": text, "width": 16})
            year = str(1985 + 2 * number + key)
            parts = {"jpg": image_bytes(90 * number + key), captions: content.encode(), "cls": year.encode()}
            samples[f"{key:06d}"] = parts
        shard(folder / f"{number:05d}.tar", samples)
        (folder / f"{number:05d}_stats.json").write_text('{"count": 2}')
    config = config_of(folder, train_data_dir=None, dataset_name=str(folder))
    rows = ImageDataset(load_split(config, "train", 0), config, labels=True)
    assert rows.id2label == {0: "1985", 1: "1986", 2: "1987", 3: "1988"}
    items = [rows[SampleKey(i, 0)] for i in range(4)]
    assert [(item["caption"], item["label"]) for item in items] == [
        ("caption 0 0", 0),
        ("caption 0 1", 1),
        ("caption 1 0", 2),
        ("caption 1 1", 3),
    ]


def test_an_archive_is_unpacked_once_and_again_when_it_changes(tmp_path, monkeypatch):
    archive = packed(with_texts(tmp_path / "pics", "1.png", "2.png"), "pics.zip")
    folder = archives.unpacked(archive)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", None)  # it is not opened again
        assert archives.unpacked(archive) == folder
        assert captions_of(archive) == ["a 1", "a 2"]
    shutil.rmtree(folder)
    assert captions_of(archive) == ["a 1", "a 2"]
    packed(with_texts(tmp_path / "pics", "1.png", "3.png", "4.png"), "pics.zip")
    assert captions_of(archive) == ["a 1", "a 3", "a 4"]


@pytest.mark.parametrize("name", ["../out.png", "/tmp/out.png", "a/../../out.png", "C:\\out.png", "..\\out.png"])
@pytest.mark.parametrize("form", ["zip", "tar"])
def test_paths_that_lead_out_are_refused(tmp_path, name, form):
    file = tmp_path / f"bad.{form}"
    if form == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo(name), b"x")
    else:
        with tarfile.open(file, "w") as archive:
            info = tarfile.TarInfo(name)
            archive.addfile(info, io.BytesIO())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="leads out of the folder"):
        load_split(config_of(file), "train", 0)
    assert not list(tmp_path.rglob("out.png"))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == [
        path for path in before if path.is_file()
    ]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(UserError, match=r"1.png, which is a link or a device"):
        load_split(config_of(tmp_path / "bad.tar"), "train", 0)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        link = zipfile.ZipInfo("1.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match=r"1.png, which is a link or a device"):
        load_split(config_of(tmp_path / "bad.zip"), "train", 0)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_damaged_archives_are_refused(tmp_path, name, damage):
    archive = packed(draw(tmp_path / "pics", *(f"{i}.png" for i in range(30))), name)
    content = archive.read_bytes()
    archive.write_bytes({"cut": content[: len(content) // 2], "other": b"no archive" * 99, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"cannot be read .*download or make it again"):
        load_split(config_of(archive), "train", 0)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".png"]


def test_an_encrypted_archive_is_refused(tmp_path):
    archive = packed(draw(tmp_path / "pics", "1.png"), "a.zip")
    content = bytearray(archive.read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1  # the flag of encryption, in both headers of the file
    archive.write_bytes(content)
    with pytest.raises(UserError, match="is encrypted; unpack it"):
        load_split(config_of(archive), "train", 0)


def test_an_archive_of_tables(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    images = [{"bytes": image_bytes(shade), "path": None} for shade in range(2)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": ["a", "b"]}), folder / "a.parquet")
    archive = packed(folder, "tables.zip")
    assert captions_of(archive, train_data_dir=None, dataset_name=str(archive)) == ["a", "b"]
    with pytest.raises(UserError, match=r"tables.zip contains no images .*give it as --dataset_name"):
        captions_of(archive)


def test_a_pattern_of_archives_is_refused(tmp_path):
    packed(draw(tmp_path / "pics", "1.png"), "a.zip")
    with pytest.raises(UserError, match="a.zip is an archive, but a pattern names only tables; give the folder"):
        load_split(config_of(tmp_path, train_data_dir=None, dataset_name=str(tmp_path / "*.zip")), "train", 0)


def test_the_process_ends_with_status_2_and_one_message(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no archive")
    command = [sys.executable, "data_scripts/check_dataset.py", "--train_data_dir", str(tmp_path / "a.zip")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the archive {tmp_path / 'a.zip'} cannot be read")
    assert len(done.stderr.splitlines()) == 1


def test_an_archive_that_does_not_fit_on_the_disk_is_refused(tmp_path, monkeypatch):
    archive = packed(draw(tmp_path / "pics", "1.png"), "a.zip")
    monkeypatch.setattr(archives, "_SPARE", 2**60)
    with pytest.raises(UserError, match=r"does not fit on the disk: 1.png has .* HF_HOME"):
        load_split(config_of(archive), "train", 0)
    assert not list((tmp_path / "cache").rglob("*.png"))
