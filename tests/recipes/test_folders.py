"""Everything that belongs to the same images lies in one folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from pipelines.tools.cli import UserError
from training.recipes.folders import collection_folder


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def images(folder: str, count: int = 3, color: int = 0) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20 + i + color, 20)).save(f"{folder}/{i}.png")
    return folder


def begun(folder: Path) -> Path:
    (folder / "autoencoder_64").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("source", "name"),
    [("my_images", "my_images"), ("deep/in/it", "it"), ("./my images!/", "my_images"), ("org/name", "name")],
)
def test_the_folder_has_the_name_of_the_images(source, name):
    if source != "org/name":  # a Hub id
        images(source)
    assert collection_folder(source, write=False) == Path("runs") / name
    assert not Path("runs").exists()


def test_a_file_gives_its_name_without_the_extension():
    Path("pairs.parquet").write_bytes(b"x")
    assert collection_folder("pairs.parquet", write=False) == Path("runs/pairs")


def test_other_images_in_a_folder_of_the_same_name_get_another_folder():
    first = begun(collection_folder(images("a/pics"), write=True))
    second = begun(collection_folder(images("b/pics", color=5), write=True))
    assert [first, second] == [Path("runs/pics"), Path("runs/pics_2")]
    for _ in range(2):
        assert collection_folder("a/pics", write=True) == first
        assert collection_folder("b/pics", write=True) == second


def test_a_folder_that_is_not_of_a_collection_is_left_alone():
    Path("runs/pics/checkpoints").mkdir(parents=True)
    assert collection_folder(images("pics"), write=True) == Path("runs/pics_2")
    assert not Path("runs/pics/collection.json").exists()


def test_moved_images_keep_their_folder():
    first = begun(collection_folder(images("a/pics"), write=True))
    shutil.move("a/pics", "elsewhere")
    assert collection_folder("elsewhere", write=True) == first
    shutil.copytree("elsewhere", "b/copy")
    assert collection_folder("b/copy", write=True) == first


def test_changed_images_are_refused_once_something_was_made_from_them():
    folder = collection_folder(images("pics"), write=True)
    images("pics", count=4)
    assert collection_folder("pics", write=True) == folder  # nothing was made yet
    begun(folder)
    images("pics", count=5)
    with pytest.raises(UserError, match=r"pics has changed since runs/pics was made from it: 4 files .*, now 5 files"):
        collection_folder("pics", write=True)
    Path("pics/4.png").unlink()
    assert collection_folder("pics", write=True) == folder


def test_files_that_are_neither_images_nor_captions_do_not_matter():
    folder = begun(collection_folder(images("pics"), write=True))
    for name in (".DS_Store", "Thumbs.db", "notes.docx"):
        Path("pics", name).write_bytes(b"x")
    assert collection_folder("pics", write=True) == folder
    Path("pics/captions.csv").write_text("file,caption\n", encoding="utf-8")
    with pytest.raises(UserError, match="has changed"):
        collection_folder("pics", write=True)


def test_no_path_is_written(tmp_path):
    folder = collection_folder(images("secret_place/pics"), write=True)
    text = (folder / "collection.json").read_text(encoding="utf-8")
    assert "secret_place" not in text
    assert str(tmp_path) not in text
