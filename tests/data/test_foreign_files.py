"""Files from others: no program is run for them, no other file is read, and no text reaches the terminal unescaped."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from data_scripts import check_dataset, import_captions, make_controls, train_tokenizer
from pipelines.tools.cli import UserError, printable
from pipelines.tools.files import IMAGE_FORMATS, check_image_header, read_image
from tests.support.runs import ROOT, environment
from training.core.draws import SampleKey
from training.data.checks import require_clean
from training.data.fingerprints import dataset_fingerprint
from training.data.images import DataConfig, ImageDataset, load_split
from training.data.tokenization import train_tokenizer as tokenizer_of
from training.data.transforms import BrokenImage, load_rgb

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"
UNKIND = "a\x00 red\x1b[2J \u202edoor\u2066\x9b"


def parquet(folder: Path, paths: list[str | None], name: str = "image") -> Path:
    """Save a Parquet file whose images are paths."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features({name: datasets.Image(), "text": datasets.Value("string")})
    rows = [{name: {"bytes": None, "path": path}, "text": "a"} for path in paths]
    table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)  # `datasets` would read the files
    pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    return folder


def images(folder: Path, number: int = 3, captions: list[str] | None = None) -> Path:
    folder.mkdir()
    lines = []
    for i in range(number):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": captions[i] if captions else f"text {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def dataset_of(folder: Path, **settings) -> ImageDataset:
    config = DataConfig(train_data_dir=str(folder), validation_fraction=0, resolution=16, **settings)
    return ImageDataset(load_split(config, "train", 0), config, captions=True)


# --- formats and sizes


def test_no_program_is_run_for_an_image(tmp_path, monkeypatch):
    """Ghostscript would be run by its name; a program of this name says whether it was."""
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/was_run\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    folder = images(tmp_path / "images")
    (folder / "1.png").write_bytes(EPS)
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(folder / "1.png")
    with pytest.raises(UserError, match="cannot be read as an image"):
        check_image_header(folder / "1.png")
    for source in (str(folder / "1.png"), {"bytes": EPS, "path": None}):
        with pytest.raises(BrokenImage, match="not a readable image"):
            load_rgb(source)
    assert check_dataset.main(["--train_data_dir", str(folder)]) == 2
    with pytest.raises(UserError, match="row 1 of the dataset"):
        make_controls.main(f"--train_data_dir {folder} --kind palette --output_dir {tmp_path}/made".split())
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_the_usual_formats_are_read(name):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 10)).save(file, name)
    red, green, _ = load_rgb({"bytes": file.getvalue(), "path": None}).getpixel((8, 8))
    assert red > 150 > green


def test_only_one_function_opens_images():
    for package in ("pipelines", "training", "data_scripts"):
        for file in (ROOT / package).rglob("*.py"):
            if file != ROOT / "pipelines/tools/files.py":
                text = file.read_text(encoding="utf-8")
                assert "Image.open(" not in text, file


def test_an_image_with_too_many_pixels_is_a_bad_row(tmp_path, monkeypatch, capsys):
    folder = images(tmp_path / "images")
    Image.new("L", (300, 200)).save(folder / "1.png")
    monkeypatch.setenv("HALFTONE_MAX_IMAGE_PIXELS", "50000")
    with pytest.raises(UserError, match=r"row 1 .*1.png.*it has 300×200 = 0.06 million pixels, and the limit is 0.05"):
        require_clean(dataset_of(folder))
    assert check_dataset.main(["--train_data_dir", str(folder)]) == 2
    assert "HALFTONE_MAX_IMAGE_PIXELS" in capsys.readouterr().out


@pytest.mark.slow
def test_sixteen_large_images_do_not_take_the_memory_of_sixteen(tmp_path):
    """Each has 80 million pixels of 16 bits: 4 bytes per pixel when decoded, 8 while it was converted in one piece."""
    folder = images(tmp_path / "images", 1)
    Image.new("I;16", (8000, 10_000)).save(folder / "large.png")
    lines = [json.dumps({"file_name": "0.png", "text": "a"})]
    for i in range(16):
        os.link(folder / "large.png", folder / f"copy{i}.png")
        lines.append(json.dumps({"file_name": f"copy{i}.png", "text": "a"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    code = (
        "import os; os.cpu_count = lambda: 16\n"
        "from data_scripts.check_dataset import main\n"
        "from training.core.memory import peak_resident_bytes\n"
        f"status = main(['--train_data_dir', {str(folder)!r}])\n"
        "print('peak', status, peak_resident_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    _, status, peak = done.stdout.splitlines()[-1].split()
    assert status == "0", done.stderr
    assert int(peak) < 1.5e9


# --- paths


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/hostname", "../secret.png", "secret.png", "file:///etc/hostname", "https://a/b.png"),
        "secret.tar::/../data/0.png@0+64",  # a place in a shard that, as the path of a file, would be in the dataset
    ],
)
@pytest.mark.parametrize("form", ["parquet", "jsonl", "mask"])
def test_a_path_out_of_the_dataset_is_refused(tmp_path, path, form):
    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    path = path if path.startswith(("/", "file", "http")) else str(tmp_path / "data" / path)
    path = path.replace("data/secret", "elsewhere/../secret")
    folder = tmp_path / "data"
    config = {"dataset_name": str(folder)}
    if form == "jsonl":
        folder.mkdir()
        (folder / "rows.jsonl").write_text(json.dumps({"image": path, "text": "a"}))
        config = {"dataset_name": str(folder / "rows.jsonl")}
    else:
        parquet(folder, [path], "image" if form == "parquet" else "mask")
    data = DataConfig(
        **config, validation_fraction=0, resolution=16, image_column="mask" if form == "mask" else "image"
    )
    refusal = r"names the file .*, which is not in the dataset's own folder"
    if path.startswith("http"):
        refusal = r"has the URL https://a/b.png; images are not downloaded"
    with pytest.raises(UserError, match=refusal):
        ImageDataset(load_split(data, "train", 0), data)
    flags = ["--dataset_name", config["dataset_name"], "--image_column", data.image_column]
    with pytest.raises(UserError, match=refusal):
        make_controls.main([*flags, "--kind", "palette", "--output_dir", str(tmp_path / "made")])
    with pytest.raises(UserError, match=refusal):
        check_dataset.main(flags)


def test_a_path_inside_the_dataset_is_read(tmp_path, monkeypatch):
    folder = images(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (folder / "metadata.jsonl").unlink()
    parquet(folder, [str(folder / "0.png"), "data/1.png", str(tmp_path / "data/../data/2.png")])
    data = DataConfig(dataset_name=str(folder / "train-00000-of-00001.parquet"), validation_fraction=0, resolution=16)
    rows = ImageDataset(load_split(data, "train", 0), data)
    assert [rows[SampleKey(i, 0)]["pixel_values"].shape for i in range(3)] == [(3, 16, 16)] * 3
    moved = tmp_path / "link"
    moved.symlink_to(folder)
    data = DataConfig(dataset_name=str(moved / "train-00000-of-00001.parquet"), validation_fraction=0, resolution=16)
    assert len(ImageDataset(load_split(data, "train", 0), data)) == 3


def test_the_image_of_a_link_is_copied_and_not_linked(tmp_path):
    theirs = tmp_path / "theirs.png"
    Image.new("RGB", (16, 16), "red").save(theirs)
    more = images(tmp_path / "more", 1)
    folder = images(tmp_path / "images")
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to(theirs)
    (folder / "sub").symlink_to(more)
    records = [{"file_name": name, "caption": "a"} for name in ("0.png", "1.png", "sub/0.png")]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    made = tmp_path / "made"
    import_captions.main([str(tmp_path / "captions.json"), "--image_dir", str(folder), "--output_dir", str(made)])
    assert (made / "0.png").samefile(folder / "0.png")
    for name, file in (("1.png", theirs), ("sub/0.png", more / "0.png")):
        assert not (made / name).is_symlink()
        assert (made / name).read_bytes() == file.read_bytes()
        assert file.stat().st_nlink == 1
    controls = tmp_path / "controls"
    make_controls.main(f"--train_data_dir {folder} --kind palette --output_dir {controls}".split())
    assert theirs.stat().st_nlink == 1


@pytest.mark.parametrize("name", ["loop", "nothing", "1.png"])
def test_links_in_a_loop_and_to_nothing(tmp_path, name):
    folder = images(tmp_path / "images")
    (folder / "up").symlink_to("..")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)
    rows = dataset_of(folder)
    if name == "1.png":
        with pytest.raises(UserError, match=r"row 1 .*1.png"):
            require_clean(rows)
    else:
        require_clean(rows)


# --- captions


def test_control_characters_never_reach_models_or_the_terminal(tmp_path, capsys):
    folder = images(tmp_path / "images", 3, ["a dog", UNKIND, "line one\r\nline\ttwo"])
    rows = dataset_of(folder)
    assert [rows[SampleKey(i, 0)]["caption"] for i in range(3)] == ["a dog", "a red[2J door", "line one\r\nline\ttwo"]
    train_tokenizer.main(f"--train_data_dir {folder} --output_dir {tmp_path}/tokenizer --validation_fraction 0".split())
    (tmp_path / "captions.json").write_text(json.dumps([{"file_name": "1.png\x1b[2J", "caption": "a"}] * 2))
    with pytest.raises(UserError) as refused:
        import_captions.main([str(tmp_path / "captions.json"), "--image_dir", str(folder)])
    assert "\x1b" not in printable(refused.value)
    captured = capsys.readouterr()
    printed = captured.out + "".join(captured.err.replace("\r", "").split("\x1b[A"))  # of progress bars
    assert not {character for character in UNKIND if ord(character) < 32 or ord(character) > 126} & set(printed)


def test_an_error_message_as_a_process_shows_control_characters_as_escapes(tmp_path):
    folder = images(tmp_path / "images", 2, ["a", ""])
    os.rename(folder / "1.png", folder / "1\x1b[2J.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1\x1b[2J.png", "text": ""}))
    words = [sys.executable, str(ROOT / "data_scripts/check_dataset.py"), "--train_data_dir", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 2
    assert "\x1b[2J" not in done.stdout + done.stderr
    assert r"1\x1b[2J.png" in done.stdout


def test_a_caption_of_megabytes_is_a_bad_row(tmp_path, capsys):
    folder = images(tmp_path / "images", 3, ["a dog", "x" * 3_000_000, "a cat"])
    with pytest.raises(UserError, match=r"row 1 .*: the caption has 3,000,000 characters; the limit is 20,000"):
        require_clean(dataset_of(folder))
    flags = f"--train_data_dir {folder} --output_dir {tmp_path}/tokenizer --validation_fraction 0".split()
    with pytest.raises(UserError, match=r"row 1, column 'text': the caption has 3,000,000"):
        train_tokenizer.main(flags)
    train_tokenizer.main([*flags, "--on_bad_sample", "skip"])
    (tmp_path / "captions.json").write_text(json.dumps([{"file_name": "0.png", "caption": "x" * 3_000_000}]))
    with pytest.raises(UserError, match=r"record 1 \(0.png\): the caption has 3,000,000|every 'caption' is empty"):
        import_captions.main([str(tmp_path / "captions.json"), "--image_dir", str(folder)])


@pytest.mark.parametrize("model", ["word_level", "bpe"])
def test_long_words_take_time_in_proportion_to_their_length(model):
    """Without a limit on words, one of 400,000 letters took 115 s with byte-level pieces."""
    word = "".join(chr(97 + i * i % 26) for i in range(400_000))
    started = time.monotonic()
    tokenizer = tokenizer_of([word, "a dog", "a cat"], model=model, vocab_size=400)
    assert tokenizer(word, truncation=True).input_ids
    assert time.monotonic() - started < 20


def test_other_images_with_the_same_number_of_rows_have_another_fingerprint(tmp_path):
    one, other = images(tmp_path / "one"), images(tmp_path / "other")
    assert dataset_fingerprint(dataset_of(one)) == dataset_fingerprint(dataset_of(other))
    third = images(tmp_path / "third")
    Image.new("RGB", (16, 16), "blue").save(third / "2.png")
    assert dataset_fingerprint(dataset_of(third)) != dataset_fingerprint(dataset_of(one))
