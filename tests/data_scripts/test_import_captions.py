"""Tests of import_captions.py: files of every common format become an imagefolder; all problems are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_scripts.import_captions import main
from pipelines.tools.cli import UserError
from tests.support.tiny_captions import caption, picture
from training.data.images import DataConfig, load_split


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    (folder / "sub").mkdir(parents=True)
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    picture(3).save(folder / "sub/3.png")
    picture(4).save(folder / "not_named.png")
    return folder


def write(folder: Path, content, name: str = "metadata.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def rows(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return {line["file_name"]: line["text"] for line in lines}


NAMES = ["0.png", "1.png", "2.png", "sub/3.png"]
PLAIN = [{"file_name": name, "caption": caption(i), "id": i} for i, name in enumerate(NAMES)]
FORMS = {
    "records": PLAIN,
    "other field for the file": [{"image": row["file_name"], "caption": row["caption"]} for row in PLAIN],
    "inside an object": {"version": 1, "images": PLAIN},
    "by file name": {row["file_name"]: row["caption"] for row in PLAIN},
    "records by file name": {row["file_name"]: {"caption": row["caption"]} for row in PLAIN},
    "lines": "\n".join(json.dumps(row) for row in PLAIN),
    "coco": {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(NAMES)],
        "annotations": [{"image_id": i, "caption": caption(i)} for i in range(4)],
    },
    "names without endings": [
        {"name": row["file_name"].removesuffix(".png"), "caption": row["caption"]} for row in PLAIN
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_imagefolder(tmp_path, scans, form):
    path = write(tmp_path, FORMS[form])
    assert main([str(path), "--image_dir", str(scans), "--output_dir", str(tmp_path / "out")]) == 0
    assert rows(tmp_path / "out") == {name: caption(i) for i, name in enumerate(NAMES)}
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")) == NAMES
    assert (scans / "not_named.png").is_file()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", ["file_name,caption", "Filename,Prompt", "image,text"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_spreadsheets_become_the_same_imagefolder(tmp_path, scans, separator, header, encoding):
    lines = [header.replace(",", separator), *(f'{name}{separator}"grün; 1, {caption(0)}"' for name in NAMES)]
    path = tmp_path / ("captions.tsv" if separator == "\t" else "captions.csv")
    path.write_bytes("\r\n".join(lines).encode(encoding))
    assert main([str(path), "--image_dir", str(scans), "--output_dir", str(tmp_path / "out")]) == 0
    assert rows(tmp_path / "out") == dict.fromkeys(NAMES, f"grün; 1, {caption(0)}")


def test_other_tables_and_columns(tmp_path, scans):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"img": NAMES, "text": ["a"] * 4}), tmp_path / "captions.parquet")
    main([str(tmp_path / "captions.parquet"), "--image_dir", str(scans), "--output_dir", str(tmp_path / "one")])
    path = write(tmp_path, "scan,remark\n0.png,12\n", "captions.csv")
    flags = ["--image_dir", str(scans), "--output_dir", str(tmp_path / "other")]
    main([str(path), *flags, "--file_field", "scan", "--caption_field", "remark"])
    assert (rows(tmp_path / "one"), rows(tmp_path / "other")) == (dict.fromkeys(NAMES, "a"), {"0.png": "12"})
    path = write(tmp_path, "image,caption\n0.png,one\n0.png,two\n", "captions.txt")  # as Flickr8k is distributed
    main([str(path), *flags, "--overwrite", "true"])
    assert rows(tmp_path / "other") == {"0.png": ["one", "two"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "file,text,prompt\n0.png,a,b\n", r"several fields .*\(text, prompt\).*--caption_field text"),
        ("a.csv", "scan,text\n0.png,a\n", r"names no images: .*\(they have scan, text\); name .* --file_field"),
        ("a.csv", "file,text\n0.png,a dog, running\n", "3 fields in line 2, but its header has 2"),
        ("a.csv", "file,text\n", "has no captions"),
        ("a.xlsx", "PK", "is a spreadsheet .*save it as CSV"),
    ],
)
def test_tables_that_cannot_be_imported(tmp_path, scans, name, content, message):
    with pytest.raises(UserError, match=message):
        main([str(write(tmp_path, content, name)), "--image_dir", str(scans)])


def test_it_loads_as_training_data(tmp_path, scans):
    main([str(write(tmp_path, PLAIN)), "--image_dir", str(scans)])
    data = load_split(DataConfig(train_data_dir=str(tmp_path / "scans_captioned"), validation_fraction=0), "train", 0)
    assert sorted(data["text"]) == sorted(caption(i) for i in range(4))
    assert data[0]["image"].size == (32, 32)


def test_several_captions_of_an_image_are_kept(tmp_path, scans):
    content = [*PLAIN, {"file_name": "0.png", "caption": "another"}, {"file_name": "1.png", "caption": caption(1)}]
    main([str(write(tmp_path, content)), "--image_dir", str(scans), "--output_dir", str(tmp_path / "out")])
    assert rows(tmp_path / "out")["0.png"] == [caption(0), "another"]
    assert rows(tmp_path / "out")["1.png"] == [caption(1)]


def test_another_caption_field(tmp_path, scans):
    content = [{"file_name": "0.png", "remark": " a  thing "}]
    words = [str(write(tmp_path, content)), "--image_dir", str(scans), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"no record has a field 'caption'.*remark.*--caption_field"):
        main(words)
    main([*words, "--caption_field", "remark"])
    assert rows(tmp_path / "out") == {"0.png": "a thing"}


def test_missing_images_and_captions_are_reported_together(tmp_path, scans):
    content = [
        *PLAIN,
        {"file_name": "gone.png", "caption": "x"},
        {"file_name": "1.png", "caption": ""},
        {"caption": "y"},
    ]
    words = [str(write(tmp_path, content)), "--image_dir", str(scans), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="3 records cannot be used") as error:
        main(words)
    for part in ("gone.png: the image is not in", "record 6 (1.png): no caption", "record 7: no file name"):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()
    main([*words, "--on_missing", "skip"])
    assert len(rows(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"file_name": "0.png"}], "has no captions: no record has a field 'caption'"),
        ([{"file_name": "0.png", "caption": " "}], "every 'caption' is empty"),
        ([], "has no captions"),
        ("{broken", "is not valid JSON"),
        ('"text"', "holds a str"),
    ],
)
def test_files_without_captions(tmp_path, scans, content, message):
    with pytest.raises(UserError, match=message):
        main([str(write(tmp_path, content)), "--image_dir", str(scans)])


def test_no_image_at_all(tmp_path, scans):
    words = [str(write(tmp_path, [{"file_name": "x.png", "caption": "x"}])), "--image_dir", str(scans)]
    with pytest.raises(UserError, match="none of the 1 images"):
        main([*words, "--on_missing", "skip"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no metadata file"),
        (["nowhere.json", "--image_dir", "."], "does not exist"),
        (["FILE"], "--image_dir is missing"),
        (["FILE", "--image_dir", "nowhere"], "is not a folder"),
        (["FILE", "--image_dr", "."], "did you mean"),
    ],
)
def test_flags(tmp_path, words, message):
    path = write(tmp_path, PLAIN)
    with pytest.raises(UserError, match=message):
        main([str(path) if word == "FILE" else word for word in words])


def test_an_import_is_not_overwritten_unasked(tmp_path, scans):
    words = [str(write(tmp_path, PLAIN)), "--image_dir", str(scans), "--output_dir", str(tmp_path / "out")]
    main(words)
    with pytest.raises(UserError, match="--overwrite"):
        main(words)
    (tmp_path / "out/mine.txt").write_text("keep")
    main([*words, "--overwrite", "true"])
    assert (tmp_path / "out_old_1/mine.txt").read_text() == "keep"
    assert len(rows(tmp_path / "out")) == 4


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_folders_that_hold_something_else_are_left_alone(tmp_path, scans, overwrite):
    words = [str(write(tmp_path, PLAIN)), "--image_dir", str(scans), "--overwrite", overwrite]
    with pytest.raises(UserError, match="contains the images to import"):
        main([*words, "--output_dir", str(scans)])
    with pytest.raises(UserError, match="contains the images to import"):
        main([*words, "--output_dir", str(tmp_path)])
    other = tmp_path / "other"
    other.mkdir()
    (other / "diary.txt").write_text("keep")
    (other / "metadata.jsonl").write_text("{}")  # the captions of another program
    with pytest.raises(UserError, match="is not empty and holds no imported captions made by"):
        main([*words, "--output_dir", str(other)])
    assert (other / "diary.txt").read_text() == "keep"
    assert (scans / "not_named.png").is_file()


def test_paths_of_another_machine_are_reduced_to_paths_in_the_folder(tmp_path, scans):
    (scans / "else").mkdir()
    picture(7).save(scans / "else/3.png")
    content = [
        {"file_name": "/home/her/scans/sub/3.png", "caption": "one"},
        {"file_name": "C:\\scans\\..\\scans\\else\\3.png", "caption": "another"},
    ]
    main([str(write(tmp_path, content)), "--image_dir", str(scans), "--output_dir", str(tmp_path / "out")])
    assert rows(tmp_path / "out") == {"sub/3.png": "one", "else/3.png": "another"}


def test_nothing_outside_the_folder_is_read(tmp_path, scans):
    """A path with `..` is read as a name in the folder."""
    content = [{"file_name": "../../0.png", "caption": "x"}, {"file_name": "/etc/1.png", "caption": "y"}]
    main([str(write(tmp_path, content)), "--image_dir", str(scans), "--output_dir", str(tmp_path / "out")])
    assert rows(tmp_path / "out") == {"0.png": "x", "1.png": "y"}


def test_a_single_record_is_not_read_as_a_mapping(tmp_path, scans):
    for content in (PLAIN[0], json.dumps(PLAIN[0]) + "\n"):
        main([str(write(tmp_path, content)), "--image_dir", str(scans), "--overwrite", "true"])
        assert rows(tmp_path / "scans_captioned") == {"0.png": caption(0)}


def test_two_names_of_one_file_and_endings_in_capitals(tmp_path, scans):
    picture(5).save(scans / "5.JPG")
    content = [
        {"name": "5", "caption": "from a scanner"},
        {"name": "1", "caption": "one"},
        {"name": "1.png", "caption": "two"},
        {"name": "1.png", "caption": "one"},
    ]
    main([str(write(tmp_path, content)), "--image_dir", str(scans)])
    assert rows(tmp_path / "scans_captioned") == {"5.JPG": ["from a scanner"], "1.png": ["one", "two"]}


@pytest.mark.parametrize("name", ["metadata.jsonl", "letter.pdf"])
def test_files_that_are_not_images_are_not_touched(tmp_path, scans, name):
    (scans / name).write_text("mine")
    words = [str(write(tmp_path, [*PLAIN, {"file_name": name, "caption": "a letter"}])), "--image_dir", str(scans)]
    with pytest.raises(UserError, match=f"{name}: is not an image"):
        main(words)
    main([*words, "--on_missing", "skip"])
    assert (scans / name).read_text() == "mine"


def test_other_encodings(tmp_path, scans):
    path = tmp_path / "captions.json"
    words = [str(path), "--image_dir", str(scans)]
    text = json.dumps([{"file_name": "0.png", "caption": "ein grüner Käfer"}], ensure_ascii=False)
    path.write_bytes(text.encode("cp1252"))
    with pytest.raises(UserError, match="is not UTF-8 .*save it as UTF-8"):
        main(words)
    path.write_bytes(text.encode("utf-16"))
    main(words)
    assert rows(tmp_path / "scans_captioned") == {"0.png": "ein grüner Käfer"}


def test_the_image_folder_may_be_the_current_one(tmp_path, scans, monkeypatch):
    monkeypatch.chdir(scans)
    main([str(write(tmp_path, PLAIN)), "--image_dir", "."])
    assert len(rows(tmp_path / "scans_captioned")) == 4
    monkeypatch.chdir(scans / "sub")
    with pytest.raises(UserError, match="--overwrite"):
        main([str(write(tmp_path, PLAIN)), "--image_dir", ".."])
