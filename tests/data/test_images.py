"""Training data: sources, transforms, labels, bad rows and fingerprints, with real files of every kind."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data_scripts import make_posters
from pipelines.latent_diffusion import tokenize_captions
from pipelines.tools.cli import UserError
from tests.support.loaders import read_to_the_end
from tests.support.tiny_models import tiny_tokenizer
from training.core.draws import SampleKey
from training.data import source as data_source
from training.data.checks import require_clean, scan
from training.data.fingerprints import dataset_fingerprint
from training.data.images import DataConfig, ImageDataset, load_label_map, load_split
from training.data.tokenization import CaptionTokens
from training.data.transforms import apply_geometry, crop_geometry, flips, load_rgb, to_tensor, verify_image

ROWS = 12


def gradient(width: int = 40, height: int = 24, row: int = 0) -> Image.Image:
    """An image without symmetry, different for each row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [x * 255 // width, y * 255 // height, np.full_like(x, 20 * row % 256)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An imagefolder with captions and class names, one file per row."""
    path = tmp_path / "images"
    path.mkdir()
    lines = []
    for row in range(ROWS):
        gradient(row=row).save(path / f"{row:02d}.png")
        lines.append(
            {"file_name": f"{row:02d}.png", "text": f"picture number {row}", "label": "ab"[row % 2] + "-class"}
        )
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return path


def change_row(folder: Path, row: int, **changes: object) -> None:
    file = folder / "metadata.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[row].update(changes)
    file.write_text("\n".join(json.dumps(line) for line in lines))


def opened(folder: Path, **settings: object) -> ImageDataset:
    config = DataConfig(train_data_dir=str(folder), validation_fraction=0, resolution=16, **settings)  # type: ignore[arg-type]
    return ImageDataset(load_split(config, "train", 0), config)


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_items(folder: Path, tmp_path: Path):
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder))
    loaded.save_to_disk(tmp_path / "saved")
    loaded["train"].save_to_disk(tmp_path / "saved_split")
    (tmp_path / "parquet").mkdir()
    embedded = loaded["train"].with_format("arrow").map(datasets.table.embed_table_storage, batched=True)
    embedded.with_format(None).to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    records = [{"image": str(folder / f"{i:02d}.png"), "text": f"picture number {i}", "label": 0} for i in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    sources = [
        {"train_data_dir": str(folder)},
        *({"dataset_name": str(tmp_path / name)} for name in ("saved", "saved_split", "parquet", "rows.jsonl")),
        {"dataset_name": str(tmp_path / "parquet" / "train-00000-of-00001.parquet")},
    ]
    items = []
    for source in sources:
        config = DataConfig(**source, resolution=16, validation_fraction=0)  # type: ignore[arg-type]
        dataset = ImageDataset(load_split(config, "train", 0), config)
        assert len(dataset) == ROWS
        items.append(dataset[SampleKey(5, 77)])
    for item in items:
        assert item["caption"] == "picture number 5"
        assert torch.equal(item["pixel_values"], items[0]["pixel_values"])


def test_changed_files_are_read_again(tmp_path: Path):
    """For a folder whose README.md lists its files, the cache of `datasets` does not notice that files changed."""
    folder = tmp_path / "posters"
    for seed in (0, 1):
        make_posters.main(f"--output_dir {folder} --num_posters 10 --num_workers 1 --seed {seed} --overwrite".split())
        stored = pyarrow.parquet.read_table(next((folder / "data").glob("train-*.parquet")))["text"].to_pylist()
        data_source._open_source.cache_clear()
        assert load_split(DataConfig(dataset_name=str(folder), validation_fraction=0), "train", 0)["text"] == stored


def test_class_subfolders_become_labels(tmp_path: Path):
    for name in ("cats", "dogs"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for row in range(2):
            gradient(row=row).save(tmp_path / "animals" / name / f"{row}.png")
    config = DataConfig(train_data_dir=str(tmp_path / "animals"), resolution=16, validation_fraction=0)
    dataset = ImageDataset(load_split(config, "train", 0), config, captions=False, labels=True)
    assert dataset.id2label == {0: "cats", 1: "dogs"}
    assert [dataset[SampleKey(i, 0)]["label"] for i in range(4)] == [0, 0, 1, 1]


def test_a_missing_validation_split_is_held_out_by_seed(folder: Path):
    config = DataConfig(train_data_dir=str(folder), validation_fraction=0.25)
    parts = {seed: [load_split(config, split, seed)["text"][:] for split in ("train", "validation")] for seed in (0, 1)}
    for train, validation in parts.values():
        assert len(validation) == 3
        assert sorted([*train, *validation]) == sorted(f"picture number {i}" for i in range(ROWS))
    assert parts[0][1] != parts[1][1]
    assert load_split(config, "validation", 0)["text"][:] == parts[0][1]
    config.max_train_samples = 4
    assert len(load_split(config, "train", 0)) == 4
    assert set(load_split(config, "train", 0)["text"]) <= set(parts[0][0])
    config.validation_fraction = 0
    assert len(load_split(config, "validation", 0)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--dataset_name"),
        ({"dataset_name": "./nowhere"}, "does not exist"),
        ({"train_data_dir": "nowhere"}, "check the path given by --train_data_dir"),
        ({"dataset_name": "a", "train_data_dir": "b"}, "keep one"),
        ({"train_data_dir": "FOLDER", "train_split": "trian"}, "did you mean 'train'"),
        ({"train_data_dir": "FOLDER", "validation_split": "tests"}, "no split 'tests'"),
        ({"train_data_dir": "FOLDER", "caption_column": "txt"}, "did you mean 'text'"),
        ({"train_data_dir": "FOLDER", "image_column": "text_image"}, "--image_column"),
        ({"train_data_dir": "FOLDER", "resolution": 4}, "--resolution"),
        ({"train_data_dir": "FOLDER", "validation_fraction": 1.0}, "--validation_fraction"),
        ({"train_data_dir": "EMPTY"}, "--train_data_dir"),
        ({"dataset_name": "EMPTY"}, "--dataset_name"),
    ],
)
def test_mistakes_are_user_errors(folder: Path, tmp_path: Path, settings: dict, message: str):
    (tmp_path / "empty").mkdir()
    places = {"FOLDER": str(folder), "EMPTY": str(tmp_path / "empty")}
    config = DataConfig(**{name: places.get(value, value) for name, value in settings.items()})

    def check_and_open() -> None:
        config.validate()
        for split in ("train", "validation"):
            ImageDataset(load_split(config, split, 0), config)

    with pytest.raises(UserError, match=message):
        check_and_open()


def test_a_column_without_images_is_refused(tmp_path: Path):
    rows = datasets.Dataset.from_dict({"image": [1.5, 2.5], "text": ["a", "b"]})
    rows.save_to_disk(tmp_path / "numbers")
    config = DataConfig(dataset_name=str(tmp_path / "numbers"), validation_fraction=0)
    with pytest.raises(UserError, match="not images"):
        ImageDataset(load_split(config, "train", 0), config)
    datasets.Dataset.from_dict({"image": [], "text": []}).save_to_disk(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing|no rows"):
        load_split(DataConfig(dataset_name=str(tmp_path / "nothing")), "train", 0)


def test_the_default_config_is_valid():
    DataConfig().validate()


# --- images ----------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return {"bytes": buffer.getvalue(), "path": None}


def test_decoding_of_unusual_images():
    base = gradient()
    assert load_rgb(encoded(base)).tobytes() == base.tobytes()
    half = base.convert("RGBA")
    half.putalpha(0)
    assert load_rgb(encoded(half)).getextrema() == ((255, 255),) * 3, "transparency is white"
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert load_rgb(encoded(palette)).getpixel((0, 0)) == (10, 20, 30)
    assert load_rgb(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 32768], [257, 65535]], dtype=np.uint16))
    assert [load_rgb(encoded(deep)).getpixel(at)[0] for at in ((0, 0), (1, 0), (0, 1), (1, 1))] == [0, 128, 1, 255]
    cmyk = load_rgb(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)).getpixel((4, 4))
    assert cmyk[0] > 240
    assert max(cmyk[1:]) < 15
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_rgb(animation).getpixel((0, 0)) == (255, 0, 0)
    for mode in ("1", "L", "LA", "F"):
        image = base.convert(mode) if mode != "F" else base.convert("L").convert("F")
        assert load_rgb(encoded(image, "TIFF")).mode == "RGB"


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    source = encoded(gradient(40, 24), exif=exif)
    assert load_rgb(source).size == (24, 40)
    assert verify_image(source) == (24, 40)
    assert load_rgb(source).tobytes() == gradient(40, 24).transpose(Image.Transpose.ROTATE_270).tobytes()


def test_to_tensor_is_exact_at_the_ends():
    image = Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8))
    assert to_tensor(image).flatten().tolist() == pytest.approx([-1, 1, -0.6], abs=1e-6)
    assert to_tensor(image).dtype == torch.float32


def test_geometry_crops_the_centre_and_does_not_change_images_that_fit():
    geometry = crop_geometry((41, 20), center_crop=True, random_flip=False, key=3)
    assert geometry == (11, 0, 20, 20, False)
    square = gradient(16, 16)
    same = apply_geometry(square, crop_geometry((16, 16), center_crop=True, random_flip=False, key=0), 16, "lanczos")
    assert same.tobytes() == square.tobytes()


def test_crops_and_flips_are_functions_of_the_key(folder: Path):
    first, again = (
        opened(folder, center_crop=False, random_flip=True),
        opened(folder, center_crop=False, random_flip=True),
    )
    keys = [SampleKey(4, key) for key in range(40)]
    one = [item["pixel_values"] for item in first.__getitems__(keys)]
    other = [item["pixel_values"] for item in again.__getitems__(keys[::-1])][::-1]
    assert all(torch.equal(a, b) for a, b in zip(one, other))
    assert len({tensor.numpy().tobytes() for tensor in one}) > 20
    lefts = [crop_geometry((40, 24), center_crop=False, random_flip=True, key=k).left for k in range(2000)]
    assert set(lefts) == set(range(17)), "every possible place occurs, and no other"
    assert np.mean([flips(key) for key in range(4000)]) == pytest.approx(0.5, abs=3 * 0.5 / 4000**0.5)


def test_a_flip_is_the_mirrored_image(folder: Path):
    plain, flipped = opened(folder), opened(folder, random_flip=True)
    key = next(k for k in range(100) if flips(k))
    a, b = plain[SampleKey(2, key)]["pixel_values"], flipped[SampleKey(2, key)]["pixel_values"]
    assert torch.equal(a.flip(-1), b)
    assert not torch.equal(a, b)


def test_masks_share_the_geometry_of_their_images():
    size = (40, 24)
    mask = Image.fromarray((np.arange(24 * 40).reshape(24, 40) % 5).astype(np.uint8))
    for key in range(20):
        geometry = crop_geometry(size, center_crop=False, random_flip=True, key=key)
        cut = np.array(apply_geometry(mask, geometry, 24, "nearest"))
        expected = np.array(mask)[:, geometry.left : geometry.left + 24]
        assert np.array_equal(cut, expected[:, ::-1] if geometry.flip else expected)


def test_validation_data_are_not_augmented(folder: Path):
    config = DataConfig(train_data_dir=str(folder), center_crop=False, random_flip=True, resolution=16)
    dataset = ImageDataset(load_split(config, "validation", 0), config, augment=False)
    items = [dataset[SampleKey(0, key)]["pixel_values"] for key in range(8)]
    assert all(torch.equal(item, items[0]) for item in items)


def test_loader_workers_give_the_same_batches(folder: Path):
    config = DataConfig(train_data_dir=str(folder), random_flip=True, resolution=16)
    tokens = CaptionTokens(tiny_tokenizer(), 8, "max_length")
    dataset = ImageDataset(load_split(config, "train", 0), config, caption_tokens=tokens)
    keys = [[SampleKey(i, 10 * i) for i in range(start, start + 4)] for start in (0, 4)]
    batches = []
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_sampler=keys, collate_fn=dataset.collate, num_workers=workers)
        batches.append(list(loader))
    for one, other in zip(*batches):
        assert one["pixel_values"].shape == (4, 3, 16, 16)
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert one["caption"] == other["caption"]
        assert torch.equal(one["input_ids"], tokenize_captions(tiny_tokenizer(), one["caption"], 8))
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert one["index"].tolist() == other["index"].tolist()


def test_one_of_several_captions_is_drawn_by_key(tmp_path: Path):
    image = encoded(gradient())
    rows = datasets.Dataset.from_dict({"image": [image], "text": [["one", "two", "three"]]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "several")
    config = DataConfig(dataset_name=str(tmp_path / "several"), validation_fraction=0)
    dataset = ImageDataset(load_split(config, "train", 0), config)
    drawn = [dataset[SampleKey(0, key)]["caption"] for key in range(300)]
    assert {name: 70 < drawn.count(name) < 130 for name in ("one", "two", "three")} == dict.fromkeys(
        ("one", "two", "three"), True
    )
    assert drawn[:20] == [dataset[SampleKey(0, key)]["caption"] for key in range(20)]


# --- labels and bad rows ---------------------------------------------------------------------------------------------


def test_class_names_are_numbered_in_order(folder: Path):
    config = DataConfig(train_data_dir=str(folder), validation_fraction=0.25, resolution=16)
    names = load_label_map(config)
    dataset = ImageDataset(load_split(config, "validation", 0), config, labels=True, label_map=names)
    assert dataset.id2label == {0: "a-class", 1: "b-class"}
    for i in range(len(dataset)):
        item = dataset[SampleKey(i, 0)]
        assert item["label"] == int(item["caption"].split()[-1]) % 2


def damage(folder: Path) -> None:
    """Damage the images of rows 3 and 4, and empty the caption of row 7."""
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "04.png").write_bytes(b"this is not an image")
    change_row(folder, 7, text="   ")


def test_bad_rows_are_reported_before_training(folder: Path):
    damage(folder)
    dataset = opened(folder)
    report = scan(dataset)
    assert [(p.row, p.column) for p in report.problems] == [(3, "image"), (4, "image"), (7, "text")]
    with pytest.raises(UserError, match="3 of 12 rows") as error:
        require_clean(dataset)
    assert all(name in str(error.value) for name in ("row 3", "03.png", "row 4", "row 7", "caption is empty"))
    shares = [scan(dataset, shard=(rank, 2)).problems for rank in range(2)]
    assert sorted(p.row for share in shares for p in share) == [3, 4, 7]
    messages: list[str] = []
    require_clean(opened(folder, on_bad_sample="skip"), tell=messages.append)
    assert "3 of 12" in messages[0]


def test_a_truncated_jpeg_is_reported(tmp_path: Path):
    gradient(200, 200).save(tmp_path / "0.jpg", quality=95)
    whole = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: int(len(whole) * 0.8)])
    config = DataConfig(train_data_dir=str(tmp_path), validation_fraction=0)
    dataset = ImageDataset(load_split(config, "train", 0), config, captions=False)
    assert [problem.row for problem in scan(dataset).problems] == [1]


def test_a_large_dataset_is_sampled_and_says_so(folder: Path):
    report = scan(opened(folder), max_rows=5)
    assert (report.rows, report.images_checked, report.complete) == (ROWS, 5, False)
    messages: list[str] = []
    dataset = opened(folder)
    report = scan(dataset, seconds=-1.0)
    assert report.rows == ROWS
    require_clean(dataset, tell=messages.append)
    assert messages == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_in_training_is_one_clean_message(folder: Path, workers: int):
    damage(folder)
    dataset = opened(folder)
    loader = DataLoader(dataset, batch_sampler=[[SampleKey(4, 0)]], collate_fn=dataset.collate, num_workers=workers)
    with pytest.raises(UserError, match="row 4") as error:
        read_to_the_end(loader)
    assert str(error.value).startswith("row 4 (")
    assert "Traceback" not in str(error.value)
    assert "--on_bad_sample skip" in str(error.value)


def test_skipping_uses_the_next_good_row_and_warns_once(folder: Path, caplog: pytest.LogCaptureFixture):
    damage(folder)
    dataset = opened(folder, on_bad_sample="skip")
    for _ in range(3):
        items = dataset.__getitems__([SampleKey(i, 0) for i in (2, 3, 4, 5, 7)])
        assert [item["index"] for item in items] == [2, 5, 5, 5, 8]
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["row 3", "row 4", "row 7"]
    assert "(3 bad rows so far)" in caplog.records[-1].getMessage()


def test_rows_are_named_as_they_are_stored(folder: Path):
    damage(folder)
    config = DataConfig(train_data_dir=str(folder), validation_fraction=0.25, resolution=16)
    dataset = ImageDataset(load_split(config, "train", 0), config)
    texts = dataset.dataset["text"][:]
    for problem in scan(dataset).problems:
        if problem.column == "image":
            assert problem.where.startswith(f"row {texts[problem.row].split()[-1]} (")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_the_content_alone(folder: Path, tmp_path: Path):
    before = dataset_fingerprint(opened(folder))
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert dataset_fingerprint(opened(tmp_path / "elsewhere")) == before
    # Bytes embedded in Parquet are the same data as files in a folder.
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    loaded.to_parquet(tmp_path / "rows.parquet")
    config = DataConfig(dataset_name=str(tmp_path / "rows.parquet"), validation_fraction=0, resolution=16)
    assert dataset_fingerprint(ImageDataset(load_split(config, "train", 0), config)) == before
    for change in ("caption", "image"):
        other = tmp_path / change
        shutil.copytree(folder, other)
        if change == "caption":
            change_row(other, 11, text="another")
        else:
            gradient(row=99).save(other / "11.png")
        assert dataset_fingerprint(opened(other)) != before, change
