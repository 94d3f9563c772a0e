"""Folders of images as people have them: no file is left out because of its name, and every file is accounted for."""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pipelines.tools.cli import UserError
from pipelines.tools.files import image_suffixes
from training.core.draws import SampleKey
from training.data import source
from training.data.checks import scan
from training.data.folder_captions import words_of
from training.data.images import DataConfig, ImageDataset, load_label_map, load_split
from training.data.source import folder_account, load_all_splits

SUFFIXES = (".png", ".jpg", ".webp", ".bmp", ".tif", ".gif")


def draw(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), zlib.crc32(name.encode()) % 2**24).save(folder / name)
    return folder


def config_of(folder: Path, **settings: object) -> DataConfig:
    """Return the config of a process that starts now: nothing is open."""
    source._open_source.cache_clear()
    return DataConfig(**{"train_data_dir": str(folder), "validation_fraction": 0, "resolution": 16, **settings})  # type: ignore[arg-type]


def splits_of(folder: Path, **settings: object) -> dict[str, list[str]]:
    """Return the paths of the images of each split, relative to the folder."""
    opened = load_all_splits(config_of(folder, **settings))
    undecoded = {name: rows.cast_column("image", datasets.Image(decode=False)) for name, rows in opened.items()}
    return {
        name: [Path(image["path"]).relative_to(folder).as_posix() for image in rows["image"]]
        for name, rows in undecoded.items()
    }


def classes_of(folder: Path, **settings: object) -> Counter[str]:
    config = config_of(folder, **settings)
    names = load_label_map(config)
    rows = ImageDataset(load_split(config, "train", 0), config, captions=False, labels=True, label_map=names)
    return Counter(names.names[rows[SampleKey(i, 0)]["label"]] for i in range(len(rows)))


def captions_of(folder: Path, **settings: object) -> dict[str, object]:
    """Return the caption of each image of the training split, by its path in the folder."""
    names = splits_of(folder, **settings)["train"]
    return dict(zip(names, load_split(config_of(folder, **settings), "train", 0)["text"], strict=True))


def account_of(folder: Path, **settings: object) -> str:
    account = folder_account(config_of(folder, **settings))
    assert account is not None
    return "\n".join(account.lines())


# --- names of splits


@pytest.mark.parametrize("name", ["train", "test", "val", "dev", "Training", "eval"])
@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_a_class_with_the_name_of_a_split_is_a_class(tmp_path, name, flag):
    folder = draw(tmp_path / "pics", *(f"{c}/{i}{s}" for c in ("bus", "car", name) for i, s in enumerate(SUFFIXES)))
    flags = {"train_data_dir": None, flag: str(folder)}
    assert classes_of(folder, **flags) == {"bus": 6, "car": 6, name: 6}
    account = account_of(folder, **flags)
    assert "Classes by folder:" in account
    assert f"The folder {name} has the name of a split, but is read like any other folder" in account
    assert f"give {folder / name}" in account
    assert len(splits_of(folder / name)["train"]) == 6, "the remedy that the account names"


@pytest.mark.parametrize("name", ["test_01.jpg", "train.jpg", "my-dev-1.jpg", "validation 2.jpg", "eval.png"])
@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_names_of_files_are_not_splits(tmp_path, name, flag):
    folder = draw(tmp_path / "pics", name, "a.jpg", "b.jpg")
    splits = splits_of(folder, **{"train_data_dir": None, flag: str(folder)})
    assert {split: sorted(names) for split, names in splits.items()} == {"train": sorted([name, "a.jpg", "b.jpg"])}
    assert "Nothing is left out." in account_of(folder)


@pytest.mark.parametrize(
    "form", ["{split}/{name}", "wrapped/{split}/{name}", "{split}/cat/{name}", "cat/{split}/{name}"]
)
@pytest.mark.parametrize("names", [("train", "test"), ("train", "val"), ("Train", "Test"), ("training", "dev")])
def test_folders_of_splits_are_splits_if_all_images_are_in_them(tmp_path, form, names):
    files = [form.format(split=split, name=f"{i}.png") for split in names for i in range(2)]
    folder = draw(tmp_path / "pics", *files)
    kinds = {"train": "train", "test": "test", "val": "validation", "training": "train", "dev": "validation"}
    expected: dict[str, list[str]] = {}
    for file in sorted(files):
        split = next(kinds[part] for part in file.lower().split("/") if part in kinds)
        expected.setdefault(split, []).append(file)
    assert splits_of(folder) == expected
    assert "Nothing is left out." in account_of(folder)


def test_classes_below_or_above_the_folders_of_splits(tmp_path):
    files = [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("cat", "test") for i in range(2)]
    assert classes_of(draw(tmp_path / "below", *files)) == {"cat": 2, "test": 2}
    files = [f"{c}/{s}/{i}.png" for s in ("train", "test") for c in ("cat", "dog") for i in range(2)]
    assert classes_of(draw(tmp_path / "above", *files)) == {"cat": 2, "dog": 2}


@pytest.mark.parametrize("others", [("extra/a.png",), ("a.png", "b.png"), ("raw/more/a.png",)])
def test_images_outside_the_folders_of_several_splits_are_refused(tmp_path, others):
    folder = draw(tmp_path / "pics", "train/1.png", "train/2.png", "test/1.png", *others)
    with pytest.raises(UserError) as refused:
        load_all_splits(config_of(folder))
    message = str(refused.value)
    assert f"{folder} has the folders test (1 images) and train (2 images)" in message
    assert f"{len(others)} other images are outside of them; move every image into" in message


def test_one_folder_of_a_split_beside_other_images(tmp_path):
    folder = draw(tmp_path / "pics", "a.png", "b.png", "val/1.png")
    assert splits_of(folder) == {"train": ["a.png", "b.png", "val/1.png"]}
    account = account_of(folder)
    assert "The folder val has the name of a split, but is read like any other folder, because 2 images are" in account
    assert (
        "not read as classes, because the images are at different depths (2 in the folder itself, 1 in its" in account
    )


def test_two_folders_of_splits_are_not_classes_and_it_is_said(tmp_path):
    folder = draw(tmp_path / "pics", "test/1.png", "train/1.png")
    assert splits_of(folder) == {"train": ["train/1.png"], "test": ["test/1.png"]}
    assert "The folders test, train are read as splits, not as classes." in account_of(folder)


@pytest.mark.parametrize("metadata", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_a_folder_of_a_split_does_not_swallow_the_rows_of_metadata(tmp_path, metadata, name):
    names = [f"{name}/1.png", f"{name}/2.png", "others/1.png"]
    folder = draw(tmp_path / "pics", *names)
    write_table(folder / metadata, {"file_name": names, "text": ["one", "two", "three"]})
    assert captions_of(folder) == dict(zip(names, ["one", "two", "three"], strict=True))
    assert classes_of(folder) == {name: 2, "others": 1}


def test_rows_of_one_table_belong_to_the_splits_of_their_images(tmp_path):
    names = ["train/1.png", "test/1.png", "train/2.png"]
    folder = draw(tmp_path / "pics", *names)
    write_table(folder / "metadata.csv", {"file_name": names, "text": ["one", "two", "three"]})
    assert splits_of(folder) == {"train": ["train/1.png", "train/2.png"], "test": ["test/1.png"]}
    assert captions_of(folder) == {"train/1.png": "one", "train/2.png": "three"}


def test_tables_that_datasets_would_leave_out_are_refused(tmp_path):
    image = {"bytes": (draw(tmp_path, "a.png") / "a.png").read_bytes(), "path": None}
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in ("train", "bus", "car"):
        rows = datasets.Dataset.from_dict({"image": [image]}, features=datasets.Features(image=datasets.Image()))
        rows.to_parquet(folder / f"{name}.parquet")
    with pytest.raises(UserError, match=r"2 of 3 .parquet files in .* are in no split \(bus.parquet, car.parquet\)"):
        load_all_splits(DataConfig(dataset_name=str(folder)))
    (folder / "train.parquet").rename(folder / "lorry.parquet")
    source._open_source.cache_clear()
    assert len(load_all_splits(DataConfig(dataset_name=str(folder)))["train"]) == 3


# --- captions


def write_table(path: Path, columns: dict[str, list], separator: str = ",") -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        lines = [separator.join(columns), *(separator.join(map(str, row.values())) for row in rows)]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


IMAGES = ["0.png", "1.png", "2.png"]
CAPTIONS = ["a red bus", "none", "grün, 3 Käfer"]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", ["file_name,text", "File Name,Caption", "filename,prompt", "image,description"])
@pytest.mark.parametrize("name", ["captions.csv", "metadata.csv", "My Captions.tsv"])
def test_tables_of_spreadsheets(tmp_path, separator, header, name):
    folder = draw(tmp_path / "pics", *IMAGES)
    quoted = [f'"{caption}"' for caption in CAPTIONS]
    table = write_table(folder / name, dict(zip(header.split(","), (IMAGES, quoted), strict=True)), separator)
    assert captions_of(folder) == dict(zip(IMAGES, CAPTIONS, strict=True))
    column = header.split(",")[1]
    assert f"Captions: column {column} of {name}.\n" in account_of(folder)
    content = table.read_text(encoding="utf-8")
    for encoded in (codecs.BOM_UTF8 + content.replace("\n", "\r\n").encode(), content.encode("utf-16")):
        table.write_bytes(encoded)
        assert captions_of(folder) == dict(zip(IMAGES, CAPTIONS, strict=True))


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.parquet"])
def test_other_tables(tmp_path, name):
    folder = draw(tmp_path / "pics", *IMAGES)
    write_table(folder / name, {"image": IMAGES, "caption": CAPTIONS, "year": [1, 2, 3]})
    assert captions_of(folder) == dict(zip(IMAGES, CAPTIONS, strict=True))
    rows = load_split(config_of(folder), "train", 0)
    assert rows["year"] == [1, 2, 3]
    assert rows["caption"] == CAPTIONS


@pytest.mark.parametrize(
    "written", ["photos\\0.png", "0", "C:\\scans\\photos\\0.png", "/home/her/photos/0.png", "0.png", "photos/0.png"]
)
def test_names_of_images_as_programs_write_them(tmp_path, written):
    folder = draw(tmp_path / "pics", "photos/0.png", "photos/1.png")
    if written == "0":
        folder = folder / "photos"
    write_table(folder / "captions.csv", {"file": [written], "caption": ["a bus"]})
    assert list(captions_of(folder).values()) == ["a bus"]
    assert "Left out: images in no row of captions.csv: 1 (" in account_of(folder)


def test_a_name_that_macos_has_decomposed(tmp_path):
    folder = draw(tmp_path / "pics", "Ka\u0308fer.png")
    write_table(folder / "captions.csv", {"file": ["K\u00e4fer.png"], "caption": ["a beetle"]})
    assert captions_of(folder) == {"Ka\u0308fer.png": "a beetle"}


def test_tables_that_name_only_images(tmp_path):
    folder = draw(tmp_path / "pics", "a/0.png", "a/1.png", "b/2.png")
    for name in ("a", "b"):
        write_table(folder / name / "metadata.csv", {"file_name": ["0.png", "2.png"]})
    assert load_split(config_of(folder), "train", 0).column_names == ["image", "label"]
    assert splits_of(folder)["train"] == ["a/0.png", "a/2.png", "b/0.png", "b/2.png"]


def test_several_rows_of_an_image_become_several_captions(tmp_path):
    folder = draw(tmp_path / "pics", *IMAGES)
    write_table(folder / "captions.csv", {"image": ["0.png", "1.png", "0.png"], "caption": ["a", "b", "c"]})
    assert captions_of(folder) == {"0.png": ["a", "c"], "1.png": ["b"]}


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_text_files_beside_the_images(tmp_path, suffix):
    folder = draw(tmp_path / "pics", "0.png", "sub/1.jpg", "2.png")
    (folder / f"0{suffix}").write_bytes(codecs.BOM_UTF8 + "a red\r\nbüs ".encode())
    (folder / f"sub/1{suffix}").write_text("a car", encoding="utf-8")
    (folder / "notes.txt").write_text("buy milk")
    assert captions_of(folder) == {"0.png": "a red büs", "2.png": None, "sub/1.jpg": "a car"}
    config = config_of(folder)
    problems = scan(ImageDataset(load_split(config, "train", 0), config)).problems
    assert [problem.reason for problem in problems] == ["the caption is missing"], "it is not skipped in silence"
    assert "Captions: text files beside the images.\n" in account_of(folder)
    assert "Left out: other files: 1 (notes.txt)." in account_of(folder)


def test_captions_and_folders_of_classes(tmp_path):
    names = [f"{name}/{i}.png" for name in ("bus", "car") for i in range(2)]
    for form in ("metadata.jsonl", "captions.csv", "txt"):
        folder = draw(tmp_path / form.replace(".", "_"), *names)
        if form == "txt":
            for name in names:
                (folder / name).with_suffix(".txt").write_text(f"a {name}")
        else:
            write_table(folder / form, {"file_name": names, "text": [f"a {name}" for name in names]})
        assert captions_of(folder) == {name: f"a {name}" for name in names}
        assert classes_of(folder) == {"bus": 2, "car": 2}
    write_table(folder / "metadata.csv", {"file_name": names, "label": ["x", "y", "y", "y"]})
    assert classes_of(folder) == {"x": 1, "y": 3}, "a column of the table comes first"


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("red_circle-012 (2)", "red circle"),
        ("a.b", "a b"),
        ("2 cats 3", "2 cats"),
        ("0042", "0042"),
        ("Käfer", "Käfer"),
    ],
)
def test_names_as_captions(name, caption):
    assert words_of(name) == caption


def test_captions_from_names_of_files_and_folders(tmp_path):
    folder = draw(tmp_path / "pics", "golden_retriever/a-dog_1.png", "tabby/a_cat.png")
    names = ["golden_retriever/a-dog_1.png", "tabby/a_cat.png"]
    by_file, by_folder = (captions_of(folder, caption_source=source) for source in ("file_name", "folder_name"))
    assert by_file == dict(zip(names, ["a dog", "a cat"], strict=True))
    assert by_folder == dict(zip(names, ["golden retriever", "tabby"], strict=True))
    assert "text" not in load_split(config_of(folder), "train", 0).column_names
    draw(folder, "0.png")
    with pytest.raises(UserError, match=r"0.png is in .*pics itself; move it into a folder"):
        captions_of(folder, caption_source="folder_name")


# --- what can be read in two ways


def refused(folder: Path, **settings: object) -> str:
    with pytest.raises(UserError) as error:
        load_all_splits(config_of(folder, **settings))
    return str(error.value)


def test_two_sources_of_captions_are_refused(tmp_path):
    folder = draw(tmp_path / "pics", *IMAGES)
    for name in ("captions.csv", "old.csv"):
        write_table(folder / name, {"file": IMAGES, "caption": ["a", "b", "c"]})
    assert "has captions in several tables (captions.csv, old.csv); keep one" in refused(folder)
    (folder / "old.csv").unlink()
    for name in IMAGES:
        (folder / name).with_suffix(".txt").write_text("a")
    assert "both in captions.csv and in text files beside the images, such as 0.txt" in refused(folder)
    assert captions_of(folder, caption_source="file_name")["0.png"] == "0"


def test_several_columns_of_captions_need_a_flag(tmp_path):
    folder = draw(tmp_path / "pics", *IMAGES)
    write_table(folder / "captions.csv", {"file": IMAGES, "caption": ["a", "b", "c"], "prompt": ["d", "e", "f"]})
    with pytest.raises(UserError, match="no column 'text'.*its columns are image, caption, prompt"):
        ImageDataset(load_split(config_of(folder), "train", 0), config_of(folder))
    config = config_of(folder, caption_column="prompt")
    assert ImageDataset(load_split(config, "train", 0), config)[SampleKey(1, 0)]["caption"] == "e"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,caption\n0.png,a dog, running\n", r"has 3 fields in line 2, but its header has 2; is there a comma in"),
        ('file,caption\n0.png,"a dog\n', "is a quotation mark not closed"),
        ("title,year\n0.png,3\n", r"no column with the names of the images \(its columns are title, year\)"),
        ("", "metadata.csv is empty; write one line for each image, or delete it"),
        (
            "file,caption\nx.png,a\ny.png,b\n",
            "none of the 2 rows of metadata.csv names an image .* first names x.png",
        ),
        ("file,caption\n0.png,gr\udcfcn\n", r"is not UTF-8 \(byte"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, content, message):
    folder = draw(tmp_path / "pics", *IMAGES)
    (folder / "metadata.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert re.search(message, refused(folder))


def test_names_of_files_as_captions_need_a_folder_of_images(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    message = refused(
        tmp_path / "rows.jsonl",
        train_data_dir=None,
        dataset_name=str(tmp_path / "rows.jsonl"),
        caption_source="file_name",
    )
    assert "--caption_source is file_name, but" in message
    assert "remove --caption_source" in message


# --- the account of all files


def test_every_file_is_accounted_for(tmp_path):
    folder = draw(tmp_path / "pics", *IMAGES, "more/3.PNG")
    write_table(folder / "metadata.csv", {"file_name": IMAGES[:2], "text": ["a", "b"]})
    draw(tmp_path / "linked", "9.png")
    (folder / "link").symlink_to(tmp_path / "linked")
    (folder / "IMG_1").write_bytes((folder / "0.png").read_bytes())
    for name in ("a.psd", "0.txt", "captions.json", "notes.docx", "x.rar", "list.xlsx", ".DS_Store", "b.heic"):
        (folder / name).write_text('[{"file": "0.png", "caption": "a"}]')
    account = folder_account(config_of(folder))
    assert account is not None
    entries = {entry.what: (entry.count, entry.examples) for entry in account.left_out}
    expected: dict[str, tuple[int, list[str]]] = {
        "images in no row of metadata.csv": (2, ["2.png", "more/3.PNG"]),
        "images in formats that are not read": (1, ["a.psd"]),
        "images without the extension of an image": (1, ["IMG_1"]),
        "archives": (1, ["x.rar"]),
        "spreadsheets": (1, ["list.xlsx"]),
        "linked folders": (1, ["link"]),
        "files that look like captions": (2, ["0.txt", "captions.json"]),
        "other files": (1, ["notes.docx"]),
        "hidden files": (1, []),
    }
    if ".heic" in image_suffixes():
        expected["images in no row of metadata.csv"] = (3, ["2.png", "b.heic", "more/3.PNG"])
    else:
        expected["HEIC images"] = (1, ["b.heic"])
    assert entries == expected
    rows_and_table = 2 + 1
    assert account.files == rows_and_table + sum(count for count, _ in entries.values())
    line = account.line()
    assert "2 in train; captions: column text of metadata.csv; no classes by folder. Left out: images in no row" in line
    assert "notes" not in line
    assert "hidden" not in line
    assert "\n" not in line


def test_the_account_survives_the_record(tmp_path):
    folder = draw(tmp_path / "pics", *IMAGES)
    (folder / "a.psd").write_text("")
    first = account_of(folder)
    assert account_of(folder) == first
    (folder / "a.psd").unlink()
    assert "Nothing is left out." in account_of(folder)


@pytest.mark.parametrize("name", ["captions.json", "captions.txt"])
def test_captions_that_have_to_be_imported_name_the_command(tmp_path, name):
    folder = draw(tmp_path / "pics", *IMAGES)
    content = '{"images": [], "annotations": []}' if name.endswith("json") else "image,caption\n0.png,a\n"
    (folder / name).write_text(content)
    assert f"import_captions.py {folder / name} --image_dir {folder}" in account_of(folder)


def test_a_folder_without_images_that_can_be_read(tmp_path):
    folder = tmp_path / "pics"
    folder.mkdir()
    assert "contains no images that can be read; give another folder with --train_data_dir" in refused(folder)
    (folder / "a.psd").write_text("")
    assert "(images in formats that are not read: 1); convert them to PNG or JPEG" in refused(folder)
    write_table(folder / "rows.parquet", {"text": ["a"]})
    assert "give it as --dataset_name instead of --train_data_dir" in refused(folder)


@pytest.mark.skipif(".heic" in image_suffixes(), reason="pillow-heif is installed")
def test_heic_without_its_package(tmp_path):
    folder = draw(tmp_path / "pics", *IMAGES)
    (folder / "IMG_1.HEIC").write_text("")
    assert "HEIC images: 1 (IMG_1.HEIC); they need the package pillow-heif: pip install" in account_of(folder)


def test_heic_with_its_package(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    folder = draw(tmp_path / "pics", *IMAGES)
    Image.new("RGB", (16, 16), (200, 10, 10)).save(folder / "IMG_1.HEIC", "HEIF")
    config = config_of(folder)
    rows = ImageDataset(load_split(config, "train", 0), config, captions=False)
    assert len(rows) == 4
    assert rows[SampleKey(3, 0)]["pixel_values"][0].mean() > 0.3
