"""Tests of caption_images.py: tiny real models caption folders of every kind, and what is there is not lost."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from PIL import Image

from data_scripts.caption_images import main
from data_scripts.captioning.models import load_captioner
from pipelines.image_caption import ImageCaptionPipeline
from pipelines.tools.cli import UserError
from tests.conftest import forget_accelerate
from tests.support import tiny_captioners
from tests.support.child import Child
from tests.support.tiny_captions import MODEL_FLAGS, RESOLUTION, picture, tiny_caption_pipeline
from training import train_image_caption
from training.data.images import DataConfig, load_split
from training.data.transforms import load_rgb

WORDS = {*tiny_captioners.WORDS, "what", "is", "this"}
JOURNAL = "__captions/journal.jsonl"


def joint_pipeline() -> ImageCaptionPipeline:
    """Return a joint model with weights so large that it has a caption for every image."""
    pipeline = tiny_caption_pipeline()
    torch.manual_seed(0)
    for parameter in pipeline.model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    joint_pipeline().save_pretrained(folder / "joint")
    saved = {
        "blip": tiny_captioners.save_blip(folder / "blip"),
        "git": tiny_captioners.save_git(folder / "git"),
        "encoder_decoder": tiny_captioners.save_encoder_decoder(folder / "encoder_decoder"),
        "llava": tiny_captioners.save_llava(folder / "llava"),
        "classifier": tiny_captioners.save_classifier(folder / "classifier"),
    }
    return {**saved, "joint": folder / "joint"}


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Six images, one of them in a subfolder."""
    folder = tmp_path / "scans"
    (folder / "sub").mkdir(parents=True)
    for i in range(5):
        picture(i, (40, 30)).save(folder / f"{i}.png")
    picture(5, (40, 30)).save(folder / "sub/5.png")
    return folder


def caption(folder: Path, model: Path, *flags: str) -> int | None:
    words = ["--train_data_dir", str(folder), "--model", str(model), "--device", "cpu", "--batch_size", "2"]
    return main([*words, "--max_new_tokens", "6", *flags])


def captions(folder: Path) -> dict[str, str]:
    """Return the caption of each image as training reads them."""
    data = load_split(DataConfig(train_data_dir=str(folder), validation_fraction=0), "train", 0)
    paths = data.cast_column("image", datasets.Image(decode=False))["image"]
    return {str(Path(image["path"]).relative_to(folder)): text for image, text in zip(paths, data["text"])}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blip", "git", "encoder_decoder", "joint"])
def test_every_kind_of_model_captions_a_folder(models, scans, name):
    before = contents(scans)
    assert caption(scans, models[name]) == 0
    read = captions(scans)
    assert sorted(read) == ["0.png", "1.png", "2.png", "3.png", "4.png", "sub/5.png"]
    assert all(text and set(text.replace(",", "").split()) <= WORDS for text in read.values())
    assert {name: contents(scans)[name] for name in before} == before
    assert not (scans / JOURNAL).exists()


def test_captions_are_those_of_transformers(models, scans):
    caption(scans, models["blip"])
    model = transformers.BlipForConditionalGeneration.from_pretrained(models["blip"])
    processor = transformers.BlipProcessor.from_pretrained(models["blip"])
    for name, text in captions(scans).items():
        inputs = processor(images=Image.open(scans / name).convert("RGB"), return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert text == processor.decode(ids[0], skip_special_tokens=True)
    assert len(set(captions(scans).values())) > 1


def test_captions_are_those_of_our_pipeline(models, scans):
    main(["--train_data_dir", str(scans), "--model", str(models["joint"]), "--device", "cpu"])
    images = [load_rgb(str(scans / name)) for name in sorted(captions(scans))]
    assert [captions(scans)[name] for name in sorted(captions(scans))] == [
        " ".join(text.split()) for text in joint_pipeline().caption(images)
    ]
    with pytest.raises(UserError, match="takes no prompt"):
        load_captioner(str(models["joint"]), "a red", None, "cpu")


@pytest.mark.parametrize("name", ["blip", "git", "encoder_decoder"])
def test_a_caption_continues_the_prompt(models, name):
    images = [picture(i, (40, 30)) for i in range(3)]
    texts = load_captioner(str(models[name]), "a red", 6, "cpu")(images)
    assert all(text.startswith("a red") for text in texts)
    assert any(len(text.split()) > 2 for text in texts)
    assert texts != load_captioner(str(models[name]), None, 6, "cpu")(images)


def test_an_answer_does_not_contain_the_question(models):
    images = [picture(i, (40, 30)) for i in range(3)]
    answers = load_captioner(str(models["llava"]), "what is this", 6, "cpu")(images)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(models["llava"])
    processor = transformers.LlavaProcessor.from_pretrained(models["llava"])
    for image, answer in zip(images, answers):
        inputs = processor(images=image, text="<image> what is this", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert answer == processor.decode(ids, skip_special_tokens=True)
    with pytest.raises(UserError, match="answers a question about an image; ask one with --prompt"):
        load_captioner(str(models["llava"]), None, 6, "cpu")


def test_images_are_upright(models, tmp_path):
    """A photograph that is stored lying on its side has the caption of the upright one."""
    upright = picture(2, (40, 30)).crop((0, 0, 30, 30)).resize((48, 24))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    for name, image in (("a", upright), ("b", turned), ("c", turned)):
        (tmp_path / "folder").mkdir(exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "b" else 1
        image.save(tmp_path / f"folder/{name}.png", exif=exif)
    caption(tmp_path / "folder", models["git"], "--max_new_tokens", "20")
    read = captions(tmp_path / "folder")
    assert read["a.png"] == read["b.png"] != read["c.png"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("classifier", "is a model of the type vit, which does not caption images"),
        ("nowhere", "found no pipeline, run or checkpoint"),
        ("damaged", "cannot be loaded"),
        ("", "--model is missing"),
    ],
)
def test_models_that_cannot_caption(models, scans, tmp_path, model, message):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((models["blip"] / "config.json").read_text())
    name = {"classifier": models["classifier"], "nowhere": tmp_path / "nowhere", "damaged": damaged}.get(model, "")
    with pytest.raises(UserError, match=message):
        main(["--train_data_dir", str(scans), "--model", str(name)])
    assert not (scans / "metadata.jsonl").exists()


# --- folders with some captions --------------------------------------------------------------------------------------


def test_rows_without_a_caption_are_completed(models, scans):
    rows = [{"file_name": f"{i}.png", "text": "mine, ü" if i < 2 else None, "number": i} for i in range(4)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (scans / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    before = (scans / "metadata.jsonl").read_bytes()
    caption(scans, models["git"])
    read = captions(scans)
    assert list(read) == ["0.png", "1.png", "2.png", "3.png"]  # the rows are the dataset
    assert read["0.png"] == read["1.png"] == "mine, ü"
    assert read["2.png"]
    assert read["3.png"]
    completed = (scans / "metadata.jsonl").read_text().splitlines()
    assert completed[:2] == lines[:2]
    assert json.loads(completed[3])["number"] == 3
    assert (scans / "__captions/before_1/metadata.jsonl").read_bytes() == before


@pytest.mark.parametrize("add_rows", ["false", "true"])
def test_images_in_no_row(models, scans, capsys, add_rows):
    (scans / "metadata.jsonl").write_text('{"file_name": "0.png", "text": ["one", "two"]}\n')
    caption(scans, models["git"], "--add_rows", add_rows)
    if add_rows == "false":
        assert (scans / "metadata.jsonl").read_text() == '{"file_name": "0.png", "text": ["one", "two"]}\n'
        output = capsys.readouterr().out
        assert "Every image of" in output
        assert "5 images are in no row of metadata.jsonl and stay left out, such as 1.png" in output
        return
    read = captions(scans)
    assert (len(read), read["0.png"]) == (6, ["one", "two"])
    assert all(len(texts) == 1 for name, texts in read.items() if name != "0.png")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["metadata.csv", "captions.csv"])
def test_tables_of_spreadsheets_keep_their_form(models, scans, name, separator, encoding):
    rows = [
        ["Filename", "Number", "Caption"],
        ["0.png", "007", "Käfer; 1, rot"],
        ["1.png", "01", ""],
        ["sub/5.png", "", " "],
    ]
    with (scans / name).open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    before = (scans / name).read_bytes()
    caption(scans, models["git"], "--add_rows", "true" if name == "captions.csv" else "false")
    after = "utf-8" if encoding == "utf-8" else "utf-8-sig"
    with (scans / name).open(encoding=after, newline="") as file:
        assert file.read().count("\r\n") == len((scans / name).read_bytes().splitlines())
        file.seek(0)
        written = list(csv.reader(file, delimiter=separator))
    assert written[:2] == rows[:2]
    assert [row[:2] for row in written[2:4]] == [row[:2] for row in rows[2:]]
    assert all(row[2].strip() for row in written)
    assert len(captions(scans)) == (6 if name == "captions.csv" else 3)
    assert captions(scans)["0.png"] == "Käfer; 1, rot"
    assert (scans / f"__captions/before_1/{name}").read_bytes() == before


def test_parquet_and_several_tables(models, tmp_path):
    for split in ("train", "validation"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        for i in range(2):
            picture(i).save(folder / f"{i}.png")
        table = pyarrow.table({"file_name": ["0.png", "1.png"], "text": ["mine", None], "raw": [b"\xff", b"\x00"]})
        pyarrow.parquet.write_table(table, folder / "metadata.parquet")
    caption(tmp_path / "data", models["git"])
    for split in ("train", "validation"):
        rows = pyarrow.parquet.read_table(tmp_path / "data" / split / "metadata.parquet").to_pylist()
        assert [row["raw"] for row in rows] == [b"\xff", b"\x00"]
        assert rows[0]["text"] == "mine"
        assert rows[1]["text"]
        assert (tmp_path / f"data/__captions/before_1/{split}/metadata.parquet").is_file()


def test_a_table_without_captions_gets_a_column(models, scans):
    (scans / "metadata.csv").write_text("file_name,label\n0.png,3\n1.png,4\n")
    caption(scans, models["git"])
    assert (scans / "metadata.csv").read_text().splitlines()[0] == "file_name,label,text"
    assert list(captions(scans)) == ["0.png", "1.png"]


def test_text_files_are_added_beside_the_images_without_one(models, scans):
    (scans / "0.caption").write_text("mine")
    (scans / "1.caption").write_text("\n")
    picture(7).save(scans / "2.jpg")  # 2.png and 2.jpg share a text file
    caption(scans, models["git"])
    read = captions(scans)
    assert (scans / "0.caption").read_text() == read["0.png"] == "mine"
    assert not (scans / "metadata.jsonl").exists()
    assert len(read) == 7
    assert all(read.values())
    assert read["2.png"] == read["2.jpg"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata.csv": "file_name,prompt,caption\n0.png,a,b\n"}, "choose one with --caption_column"),
        ({"captions.csv": "file,text\n0.png,a\n", **{f"{i}.txt": "b" for i in range(4)}}, "captions both in"),
        ({"more.zip": "PK"}, "zip archives; unpack them"),
        ({"metadata.jsonl": "{broken"}, "cannot be read as JSON Lines"),
    ],
)
def test_folders_that_are_refused(models, scans, files, message):
    for name, text in files.items():
        (scans / name).write_text(text)
    before = contents(scans)
    with pytest.raises(UserError, match=message):
        caption(scans, models["git"])
    assert contents(scans) == before


@pytest.mark.parametrize("words", [[], ["--train_data_dir", "nowhere"]])
def test_a_folder_is_required(words):
    with pytest.raises(UserError, match="--train_data_dir"):
        main([*words, "--model", "x"])


def test_images_that_cannot_be_read_are_listed_and_left_out(models, scans, capsys):
    whole = (scans / "3.png").read_bytes()
    (scans / "3.png").write_bytes(whole[: len(whole) // 2])
    assert caption(scans, models["git"]) == 0
    output = capsys.readouterr().out
    assert "1 images have no caption:\n  3.png: " in output
    assert "3.png" not in captions(scans)
    assert len(captions(scans)) == 5
    for path in scans.rglob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    (scans / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="no image of .* was captioned"):
        caption(scans, models["git"])
    assert not (scans / "metadata.jsonl").exists()


# --- interruptions ---------------------------------------------------------------------------------------------------


def many(folder: Path) -> Path:
    folder.mkdir()
    for i in range(24):
        picture(i, (40, 30)).save(folder / f"{i:02d}.png")
    (folder / "metadata.jsonl").write_text("".join(f'{{"file_name": "{i:02d}.png"}}\n' for i in range(24)))
    return folder


def killed(folder: Path, model: Path, batches: int, output: Path) -> None:
    """Caption a folder in a process that is killed when the journal has at least this number of batches."""
    child = Child(lambda: caption(folder, model, "--max_new_tokens", "20"), output)
    while not child.has_ended():
        with_journal = (folder / JOURNAL).is_file()
        if with_journal and (folder / JOURNAL).read_bytes().count(b"\n") > batches:
            os.kill(child.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    assert child.wait() == -signal.SIGKILL, output.read_text(encoding="utf-8")


def test_a_killed_process_is_resumed_and_ends_as_if_undisturbed(models, tmp_path):
    caption(many(tmp_path / "undisturbed"), models["git"], "--max_new_tokens", "20")
    folder = many(tmp_path / "killed")
    killed(folder, models["git"], 2, tmp_path / "first.txt")
    with (folder / JOURNAL).open("ab") as file:
        file.write(b'{"captions": {"09.png": "half of a li')
    (folder / ".writing-123-metadata.jsonl").write_text("half of a table")
    killed(folder, models["git"], 6, tmp_path / "second.txt")
    assert caption(folder, models["git"], "--max_new_tokens", "20") == 0
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_what_is_captioned_is_not_captioned_again(models, tmp_path):
    folder = many(tmp_path / "killed")
    killed(folder, models["git"], 2, tmp_path / "output.txt")
    journal = folder / JOURNAL
    lines = journal.read_text().splitlines()
    known = json.loads(lines[1])["captions"]
    lines[1] = json.dumps({"captions": dict.fromkeys(known, "as it was"), "problems": {}})
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="begun with other settings .*--max_new_tokens: 20 → 6"):
        caption(folder, models["git"])
    caption(folder, models["git"], "--max_new_tokens", "20")
    assert [name for name, text in captions(folder).items() if text == "as it was"] == sorted(known)


def test_killed_while_the_tables_are_written(models, tmp_path):
    """The journal is deleted last: with it, a folder of which some or all tables are completed is finished again."""
    folder = many(tmp_path / "killed")
    texts = {f"{i:02d}.png": f"number {i}" for i in range(24)}
    undisturbed = (folder / "metadata.jsonl").read_bytes()
    settings = {"model": str(models["git"]), "prompt": None, "batch_size": 2, "max_new_tokens": 6}
    lines = [{"settings": settings}, {"captions": texts, "problems": {}}]
    for copied in (False, True):
        (folder / "__captions").mkdir(exist_ok=True)
        (folder / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
        caption(folder, models["git"])
        assert captions(folder) == texts
        assert [path.name for path in (folder / "__captions").glob("before_*")] == ["before_1"]
        assert (folder / "__captions/before_1/metadata.jsonl").read_bytes() == undisturbed
        if not copied:
            (folder / "metadata.jsonl").write_bytes(undisturbed)  # killed after the copy, before the table is replaced


def test_two_processes_do_not_caption_one_folder(models, scans):
    from training.core.made_folders import lock_of

    with lock_of(scans, "elsewhere"):
        child = Child(lambda: _refused(scans, models["git"]), scans.with_name("output.txt"))
        assert child.wait() == 0, child.output.read_text(encoding="utf-8")


def _refused(folder: Path, model: Path) -> int:
    with pytest.raises(UserError, match="another process is captioning"):
        caption(folder, model)
    return 0


# --- afterwards ------------------------------------------------------------------------------------------------------


def test_the_contact_sheet_shows_images_with_their_captions(models, scans):
    caption(scans, models["git"])
    sheet = Image.open(scans / "__captions/contact_sheet.png")
    assert sheet.width > 3 * 160
    caption_band = sheet.convert("L").crop((0, sheet.height // 2 - 60, sheet.width, sheet.height // 2 + 20))
    assert min(caption_band.getdata()) < 100  # ink
    (scans / "metadata.jsonl").unlink()
    (scans / "__captions/contact_sheet.png").unlink()
    caption(scans, models["git"], "--contact_sheet_images", "0")
    assert not (scans / "__captions/contact_sheet.png").exists()


def test_the_captions_are_trained_on(models, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(24):
        picture(i).save(folder / f"{i:02d}.png")
    caption(folder, models["git"])
    forget_accelerate()
    flags = ["--report_to", "none", "--cpu_threads", "1", "--resolution", str(RESOLUTION), *MODEL_FLAGS]
    flags += ["--train_batch_size", "4", "--num_previews", "2", "--preview_inference_steps", "2", "--recipe", "none"]
    flags += ["--prior.hidden_size", "16", "--prior.num_layers", "1", "--prior.repeats", "2"]
    run = tmp_path / "run"
    words = ["--train_data_dir", str(folder), "--output_dir", str(run), "--max_train_steps", "2"]
    assert train_image_caption.main([*flags, *words]) == 0
    assert json.loads((run / "record.json").read_text())["steps"] == 2
    assert torch.isfinite(torch.tensor(float((run / "metrics.csv").read_text().splitlines()[-1].split(",")[1])))
