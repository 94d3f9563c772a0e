"""Tables as pandas, polars and pyarrow write them: every type of image, text and label, and every name of a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import polars
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pipelines.tools.cli import UserError
from training.core.draws import SampleKey
from training.data import source
from training.data.images import DataConfig, ImageDataset, load_split

TEXTS = ["red", "green", "blue"]


def png(row: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (100 * row, 1, 2)).save(file, "PNG")
    return file.getvalue()


IMAGES = [png(row) for row in range(3)]


def images(kind: Any = None, path: Any = None) -> pyarrow.Array:
    """Return images as the struct that `datasets` stores, without its type."""
    fields = pyarrow.struct([("bytes", kind or pyarrow.binary()), ("path", path or pyarrow.string())])
    return pyarrow.array([{"bytes": content, "path": None} for content in IMAGES], fields)


def write(file: Path, **columns: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def config_of(name: Path | str, **settings: Any) -> DataConfig:
    """Return the config of a process that starts now: nothing is open."""
    source._open_source.cache_clear()
    return DataConfig(**{"dataset_name": str(name), "validation_fraction": 0, "resolution": 16, **settings})


def read(name: Path | str, **settings: Any) -> list[tuple[str, int | str]]:
    """Return (caption, number of the image) of each row, and its class if there are labels."""
    config = config_of(name, **settings)
    rows = load_split(config, "train", 0)
    dataset = ImageDataset(rows, config, labels="label" in rows.column_names)
    items = [dataset[SampleKey(i, 0)] for i in range(len(dataset))]
    shades = [round((float(item["pixel_values"][0, 0, 0]) + 1) * 127.5) // 100 for item in items]
    classes = [dataset.id2label[item["label"]] for item in items] if dataset.id2label else shades
    assert [IMAGES[shade] for shade in shades] == [IMAGES[i % 3] for i in range(len(items))]
    return [(item["caption"], class_) for item, class_ in zip(items, classes, strict=True)]


ROWS = list(zip(TEXTS, range(3), strict=True))


@pytest.mark.parametrize(
    "column",
    [
        images(),
        images(pyarrow.large_binary(), pyarrow.large_string()),
        images(path=pyarrow.null()),
        pyarrow.array(IMAGES),
        pyarrow.array(IMAGES, pyarrow.large_binary()),
        pyarrow.array(IMAGES, pyarrow.binary_view()),
    ],
    ids=["struct", "large struct", "struct without paths", "binary", "large_binary", "binary_view"],
)
@pytest.mark.parametrize("name", ["image", "jpg"])
def test_images_of_every_type_are_found_by_their_content(tmp_path, column, name):
    assert read(write(tmp_path / "a.parquet", **{name: column, "text": TEXTS})) == ROWS


@pytest.mark.parametrize(
    "texts",
    [
        pyarrow.array(TEXTS, pyarrow.large_string()),
        pyarrow.array(TEXTS, pyarrow.string_view()),
        pyarrow.array(TEXTS).dictionary_encode(),
        pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode(),
    ],
    ids=["large_string", "string_view", "dictionary", "large dictionary"],
)
def test_texts_of_every_type_are_captions_and_labels(tmp_path, texts):
    assert read(write(tmp_path / "a.parquet", image=images(), text=texts)) == ROWS
    labelled = write(tmp_path / "b.parquet", image=images(), text=texts, label=texts)
    assert read(labelled) == list(zip(TEXTS, TEXTS, strict=True))


@pytest.mark.parametrize("compression", ["zstd", "uncompressed"])
def test_tables_of_polars(tmp_path, compression):
    """Parquet as polars writes it: images as structs, as bytes and as paths; classes as categories and as years."""
    folder = tmp_path / "polars"
    folder.mkdir()
    for i, content in enumerate(IMAGES):
        (folder / f"{i}.png").write_bytes(content)
    structs = [{"bytes": content, "path": None} for content in IMAGES]
    for kind, column in (("structs", structs), ("bytes", IMAGES), ("paths", [f"{i}.png" for i in range(3)])):
        file = folder / f"{kind}.parquet"
        polars.DataFrame({"image": column, "text": TEXTS}).write_parquet(file, compression=compression)
        assert read(file) == ROWS, kind
    frame = polars.DataFrame({"image": IMAGES, "text": TEXTS, "label": ["x", "y", "x"]})
    frame.with_columns(polars.col("label").cast(polars.Categorical)).write_parquet(tmp_path / "categories.parquet")
    assert read(tmp_path / "categories.parquet") == list(zip(TEXTS, "xyx", strict=True))
    frame.with_columns(polars.Series("label", [1985, 2020, 1985])).write_parquet(tmp_path / "years.parquet")
    assert read(tmp_path / "years.parquet") == list(zip(TEXTS, ["1985", "2020", "1985"], strict=True))


def test_tables_of_pandas(tmp_path):
    frame = pandas.DataFrame({"image": IMAGES, "text": TEXTS, "label": pandas.Categorical(["x", "y", "x"])})
    frame.index = [7, 8, 9]
    frame.to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("red", "x"), ("green", "y"), ("blue", "x")]
    frame["label"] = [1985, 2020, 1990]
    frame["image"] = [{"bytes": content, "path": None} for content in IMAGES]
    frame.to_parquet(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [("red", "1985"), ("green", "2020"), ("blue", "1990")]


def test_the_column_of_images_is_named_if_it_has_another_name(tmp_path):
    rows = datasets.Dataset.from_dict({"photo": images().to_pylist(), "text": TEXTS})
    rows.cast_column("photo", datasets.Image()).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"no column 'image' \(column 'photo' has images\).* --image_column"):
        read(tmp_path / "a.parquet")
    config = config_of(tmp_path / "a.parquet", image_column="photo")
    assert len(ImageDataset(load_split(config, "train", 0), config)) == 3


def test_a_table_without_an_image_column_names_the_columns(tmp_path):
    file = write(tmp_path / "a.parquet", sound=pyarrow.array([b"RIFF", b"RIFF"]), text=["a", "b"])
    with pytest.raises(UserError, match="no column 'image'.* its columns are sound, text"):
        read(file)
    numbers = write(tmp_path / "b.parquet", image=[[1, 2], [3, 4]], text=["a", "b"])
    with pytest.raises(UserError, match=r"column 'image' holds List.*, not images"):
        read(numbers)


# --- names of files


@pytest.mark.parametrize("name", ["a [b]", "a#b", "100%", "pct%20x", "a::b", "with space", "ä{b}", "wh?t*"])
@pytest.mark.parametrize("form", ["file", "folder", "name of the file"])
def test_paths_with_unusual_characters(tmp_path, name, form):
    path = tmp_path / (f"{name}.parquet" if form == "name of the file" else f"{name}/a.parquet")
    write(path, image=images(), text=TEXTS)
    assert read(path.parent if form == "folder" else path) == ROWS


@pytest.mark.parametrize("name", ["a [b]", "a#b", "100%", "a::b", "with space"])
def test_folders_of_images_with_unusual_characters(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for row, content in enumerate(IMAGES):
        (folder / f"{row} {name}.png").write_bytes(content)
        (folder / f"{row} {name}.txt").write_text(TEXTS[row])
    assert read(folder, dataset_name=None, train_data_dir=str(folder)) == ROWS


def test_a_pattern_names_several_files(tmp_path, monkeypatch):
    for part in range(2):
        write(tmp_path / f"data/part-{part}.parquet", image=images(), text=TEXTS)
    write(tmp_path / "data/sub/part-2.parquet", image=images(), text=TEXTS)
    assert read(tmp_path / "data/part-*.parquet") == ROWS * 2
    assert read(tmp_path / "data/part-[1-9].parquet") == ROWS
    assert read(tmp_path / "**/*.parquet") == ROWS * 3
    monkeypatch.chdir(tmp_path)
    assert read("data/*.parquet") == ROWS * 2


def test_patterns_that_cannot_be_used(tmp_path):
    write(tmp_path / "a.parquet", image=images(), text=TEXTS)
    (tmp_path / "a.csv").write_text("image,text\n1.png,a\n")
    with pytest.raises(UserError, match=r"dataset .*\*\.arrow.* does not exist"):
        read(tmp_path / "*.arrow")
    with pytest.raises(UserError, match=r"the files have several formats .*give those of one format"):
        read(tmp_path / "a.*")


# --- paths in tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row, content in enumerate(IMAGES):
        (tmp_path / "pics").mkdir(exist_ok=True)
        (tmp_path / "pics" / f"{row} [x] #1 50%.png").write_bytes(content)
    return tmp_path


def table(separator: str, header: str, slash: str = "/") -> str:
    rows = (f"pics{slash}{row} [x] #1 50%.png{separator}{text}" for row, text in enumerate(TEXTS))
    return "\n".join([header.replace(",", separator), *rows]) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table(",", "image,text")),
        ("a.csv", table(",", "file_name,caption")),
        ("a.csv", table(";", "File Name,Caption")),
        ("a.csv", "\ufeff" + table(",", "path,prompt")),
        ("a.tsv", table("\t", "image,text")),
        ("a.tsv", table("\t", "filepath,description", "\\")),
    ],
)
def test_tables_of_paths(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    assert read(folder / name) == ROWS


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("form", ["parquet", "struct", "jsonl"])
def test_paths_in_parquet_and_json(folder, form, absolute, tmp_path_factory, monkeypatch):
    """A relative path in a table is resolved against the folder of that table, not against the current folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    paths = [str(folder / path if absolute else path) for path in (f"pics/{row} [x] #1 50%.png" for row in range(3))]
    if form == "jsonl":
        pandas.DataFrame({"image": paths, "text": TEXTS}).to_json(folder / "a.jsonl", orient="records", lines=True)
        assert read(folder / "a.jsonl") == ROWS
        return
    column = [{"bytes": None, "path": path} for path in paths] if form == "struct" else paths
    assert read(write(folder / "a.parquet", image=column, text=TEXTS)) == ROWS


def test_relative_paths_of_a_pattern_begin_at_each_file(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        for row, content in enumerate(IMAGES):
            (tmp_path / part / f"{row}.png").write_bytes(content)
        lines = [f"{row}.png\t{text}" for row, text in enumerate(TEXTS)]
        (tmp_path / part / "rows.tsv").write_text("\n".join(["image\ttext", *lines]))
    assert read(tmp_path / "*/rows.tsv") == ROWS * 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://example.com/0.png", "has the URL https://example.com/0.png; images are not downloaded"),
        ("../outside.png", "outside.png, which is not in the dataset's own folder"),
        ("/etc/hostname.png", "names the file /etc/hostname.png, which is not in the dataset's own folder"),
        ("missing.png", r"row 0 .*missing.png.* does not exist"),
    ],
)
def test_paths_that_cannot_be_read(tmp_path, path, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "outside.png").write_bytes(IMAGES[0])
    (tmp_path / "data/a.csv").write_text(f"image,text\n{path},a\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "data/a.csv")


def test_the_images_of_rows_without_paths_are_not_changed(tmp_path):
    file = write(tmp_path / "a.parquet", image=images(), text=TEXTS)
    rows = load_split(config_of(file), "train", 0)
    assert np.array_equal(np.asarray(rows[1]["image"]), np.asarray(Image.open(io.BytesIO(IMAGES[1]))))
