"""Masks and control images: cropped and flipped with their images, and refused if they are invalid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.tools.cli import UserError
from training.core.draws import SampleKey
from training.data.checks import require_clean
from training.data.companions import control_of
from training.data.images import DataConfig, ImageDataset, load_split
from training.objectives.segmentation import IGNORE_INDEX

ROWS, WIDTH, HEIGHT = 4, 40, 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images whose red is the class id × 60, masks with the ids, and control images that are the images' negatives."""
    path = tmp_path / "images"
    path.mkdir()
    lines = []
    for row in range(ROWS):
        ids = np.random.default_rng(row).integers(0, 4, (HEIGHT, WIDTH)).astype(np.uint8)
        pixels = np.stack([ids * 60, np.full_like(ids, 10), np.full_like(ids, 200)], -1)
        Image.fromarray(pixels).save(path / f"{row}.png")
        Image.fromarray(255 - pixels).save(path / f"{row}_control.png")
        Image.fromarray(ids).save(path / f"{row}_mask.png")
        names = {"file_name": "", "mask_file_name": "_mask", "conditioning_image_file_name": "_control"}
        lines.append({name: f"{row}{end}.png" for name, end in names.items()})
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return path


def opened(folder: Path, **flags: object) -> ImageDataset:
    config = DataConfig(train_data_dir=str(folder), resolution=HEIGHT, center_crop=False, random_flip=True)
    config.validation_fraction = 0
    return ImageDataset(load_split(config, "train", 0), config, captions=False, **flags)  # type: ignore[arg-type]


def test_masks_and_controls_are_cropped_and_flipped_with_their_images(folder: Path):
    data = opened(folder, num_mask_classes=4, control=control_of("conditioning_image", 0))
    seen = set()
    for key in range(12):
        item = data[SampleKey(key % ROWS, key)]
        red = ((item["pixel_values"][0] + 1) * 127.5).round().long()
        assert item["mask"].dtype == torch.int64
        assert torch.equal(item["mask"] * 60, red)
        control = item["conditioning_pixel_values"]
        torch.testing.assert_close(1 - control, (item["pixel_values"] + 1) / 2, atol=1e-6, rtol=0)
        seen.add(tuple(red.flatten()[:8].tolist()))
    assert len(seen) > 8  # each draw crops at another place, otherwise this would test only one crop


def test_several_columns_are_grey_channels_and_class_ids_are_one_hot(folder: Path):
    grey = opened(folder, control=control_of(["mask", "mask"], 0))[SampleKey(0, 0)]["conditioning_pixel_values"]
    assert grey.shape == (2, HEIGHT, HEIGHT)
    assert torch.equal(grey[0], grey[1])
    control = control_of("mask", 5)
    item = opened(folder, num_mask_classes=4, control=control)[SampleKey(0, 0)]
    hot = item["conditioning_pixel_values"]
    assert control.channels == len(hot) == 5
    assert torch.equal(hot.sum(0), torch.ones(HEIGHT, HEIGHT))
    assert torch.equal(hot.argmax(0), item["mask"])


@pytest.mark.parametrize(("columns", "unset"), [("conditioning_image", "rgb"), (["conditioning_image"], "l")])
def test_a_single_column_is_read_in_the_given_mode(folder: Path, columns, unset: str, caplog):
    """A name and a list of one name differ only if no mode is given; the list then gives a warning."""
    read = {}
    for mode in ("rgb", "l", None):
        caplog.clear()
        control = control_of(columns, mode=mode)
        assert bool(caplog.records) == (mode is None and unset == "l")
        read[mode] = opened(folder, control=control)[SampleKey(0, 0)]["conditioning_pixel_values"]
        assert control.channels == len(read[mode])
        assert (control.kind, control.names) == (
            ("image", []) if control.channels == 3 else ("masks", ["conditioning_image"])
        )
    assert (len(read["rgb"]), len(read["l"])) == (3, 1)
    assert torch.equal(read[None], read[unset])
    grey = Image.open(folder / "0_control.png").convert("L")
    assert read["l"].mul(255).round().unique().tolist() == sorted(np.unique(np.array(grey)).tolist())


def test_invalid_modes():
    config = DataConfig(conditioning_image_column=["a", "b"], conditioning_image_mode="rgb")
    with pytest.raises(UserError, match="--conditioning_image_mode rgb reads one column.*a, b"):
        config.validate()
    with pytest.raises(UserError, match="--conditioning_image_mode l and --conditioning_classes 4"):
        control_of("mask", 4, "l")


def test_palettes_are_ids_and_unlabelled_pixels_have_no_class(folder: Path):
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[:, 20:] = IGNORE_INDEX
    ids[:4] = 3
    mask = Image.fromarray(ids, "P")
    mask.putpalette([7 * i % 256 for i in range(768)])
    for row in range(ROWS):
        mask.save(folder / f"{row}_mask.png")
    item = opened(folder, num_mask_classes=4, control=control_of("mask", 4))[SampleKey(0, 5)]
    assert set(item["mask"].unique().tolist()) <= {0, 3, IGNORE_INDEX}
    assert torch.equal(item["conditioning_pixel_values"].sum(0) == 0, item["mask"] == IGNORE_INDEX)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: Image.fromarray(np.full((HEIGHT, WIDTH), 9, np.uint8)).save(path), "class id 9 is beyond the 4"),
        (
            lambda path: Image.new("L", (WIDTH, 7)).save(path),
            f"it is {WIDTH}×7 pixels, but its image is {WIDTH}×{HEIGHT}",
        ),
        (lambda path: Image.new("RGB", (WIDTH, HEIGHT)).save(path), "it has colours"),
        (lambda path: path.write_bytes(b"not an image"), "not a readable image"),
    ],
)
def test_invalid_masks_are_reported_before_training(folder: Path, spoil, message: str):
    spoil(folder / "2_mask.png")
    with pytest.raises(UserError, match=r"(?s)1 of 4 rows cannot.*row 2.*column 'mask': ") as error:
        require_clean(opened(folder, num_mask_classes=4))
    assert message in str(error.value)


def test_a_control_of_another_size_is_reported_before_training(folder: Path):
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(folder / "1_control.png")
    with pytest.raises(UserError, match="row 1.*column 'conditioning_image': it is 41×24"):
        require_clean(opened(folder, control=control_of("conditioning_image", 0)))


def test_a_missing_column_is_named_with_its_flag(folder: Path):
    with pytest.raises(UserError, match="no column 'edges'.*--conditioning_image_column"):
        opened(folder, control=control_of(["mask", "edges"], 0))
    plain = folder.with_name("plain")
    plain.mkdir()
    (folder / "0.png").rename(plain / "0.png")
    with pytest.raises(UserError, match="no column 'mask'.*--mask_column"):
        opened(plain, num_mask_classes=2)
