"""Images that are not square are kept whole on white squares with `--pad_to_square true`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.tools.cli import UserError
from training.core.draws import SampleKey
from training.data.companions import SegmentationMask
from training.data.images import DataConfig, ImageDataset, load_split, transform_fingerprint

RED, HALF = (255, 0, 0), (0, 0, 255, 128)


def opened(folder: Path, image: Image.Image, **options) -> torch.Tensor:
    """Save an image in a folder of its own, and return what is trained on, in 0 to 255."""
    folder.mkdir()
    image.save(folder / "a.png")
    config = DataConfig(train_data_dir=str(folder), resolution=8, validation_fraction=0, **options)
    rows = ImageDataset(load_split(config, "train", 0), config, captions=False)
    return ((rows[SampleKey(0, 0)]["pixel_values"] + 1) * 127.5).round()


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("size", [(8, 4), (4, 8), (16, 8)])
def test_the_whole_image_lies_in_the_middle_of_a_white_square(tmp_path: Path, size: tuple[int, int], center_crop: bool):
    whole = opened(
        tmp_path / "images", Image.new("RGB", size, RED), pad_to_square=True, center_crop=center_crop,
        image_interpolation_mode="nearest",
    )  # fmt: skip
    expected = torch.full((3, 8, 8), 255.0)
    middle = (slice(2, 6), slice(0, 8)) if size[0] > size[1] else (slice(0, 8), slice(2, 6))
    expected[(slice(1, 3), *middle)] = 0
    assert torch.equal(whole, expected)


@pytest.mark.parametrize(("mode", "channels"), [("l", [255.0]), ("rgba", [255.0, 255.0, 255.0, 0.0])])
def test_the_padding_is_white_or_transparent(tmp_path: Path, mode: str, channels: list[float]):
    image = Image.new("RGBA", (8, 4), HALF)
    corner = opened(tmp_path / "images", image, pad_to_square=True, image_mode=mode)[:, 0, 0]
    assert corner.tolist() == channels


def test_square_images_are_left_as_they_are(tmp_path: Path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    padded = opened(tmp_path / "padded", image, pad_to_square=True)
    assert torch.equal(padded, opened(tmp_path / "cropped", image))


def test_cached_latents_of_other_crops_are_not_taken_for_those_of_padded_images():
    assert transform_fingerprint(DataConfig(pad_to_square=True)) != transform_fingerprint(DataConfig())


def test_what_contradicts_padding_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="--pad_to_square and --aspect_buckets both keep whole images"):
        DataConfig(pad_to_square=True, aspect_buckets=True).validate()
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 4), RED).save(folder / "a.png")
    config = DataConfig(train_data_dir=str(folder), pad_to_square=True, validation_fraction=0)
    rows = load_split(config, "train", 0)
    with pytest.raises(UserError, match="not their masks and control images"):
        ImageDataset(rows, config, captions=False, control=SegmentationMask("image", 3))
