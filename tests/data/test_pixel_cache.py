"""Images that were decoded once come from memory afterwards, with the same pixels."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.core.draws import SampleKey
from training.data import pixel_cache
from training.data.images import DataConfig, ImageDataset, load_split
from training.data.pixel_cache import PixelCache
from training.data.transforms import apply_geometry, crop_geometry, load_rgb, to_tensor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for i, size in enumerate([(40, 30), (30, 40), (16, 16), (90, 50)]):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def opened(folder: Path, **options) -> ImageDataset:
    config = DataConfig(train_data_dir=str(folder), resolution=16, validation_fraction=0, **options)
    return ImageDataset(load_split(config, "train", 0), config, captions=False)


@pytest.mark.parametrize("random_flip", [False, True])
def test_pixels_from_memory_are_those_of_the_file(folder: Path, random_flip: bool):
    data = opened(folder, random_flip=random_flip)
    for row in range(4):
        image = load_rgb(folder / f"{row}.png")
        for key in range(8):
            place = crop_geometry(image.size, center_crop=True, random_flip=random_flip, key=key)
            expected = to_tensor(apply_geometry(image, place, 16, "lanczos"))
            assert torch.equal(data[SampleKey(row, key)]["pixel_values"], expected)


def test_a_file_is_read_once(folder: Path):
    data = opened(folder)
    first = data[SampleKey(0, 0)]["pixel_values"]
    (folder / "0.png").unlink()
    (folder / "1.png").unlink()
    assert torch.equal(data[SampleKey(0, 1)]["pixel_values"], first)
    with pytest.raises(Exception, match="does not exist"):
        data[SampleKey(1, 0)]


def test_random_crops_are_made_from_the_whole_image(folder: Path):
    data = opened(folder, center_crop=False)
    crops = {data[SampleKey(3, key)]["pixel_values"].numpy().tobytes() for key in range(20)}
    assert len(crops) > 5


def test_smaller_crops_lie_inside_the_central_square_and_need_no_file(folder: Path):
    data = opened(folder, crop_scale=0.5)
    image = load_rgb(folder / "3.png")  # 90 × 50
    place = crop_geometry(image.size, center_crop=True, random_flip=False, key=0)
    square = apply_geometry(image, place, 32, "lanczos")
    data[SampleKey(3, 0)]
    (folder / "3.png").unlink()
    for key in range(20):
        crop = crop_geometry((32, 32), center_crop=True, random_flip=False, key=key, crop_scale=0.5)
        assert 16 <= crop.width == crop.height <= 32
        assert 0 <= crop.left <= 32 - crop.width
        assert 0 <= crop.top <= 32 - crop.width
        expected = to_tensor(apply_geometry(square, crop, 16, "lanczos"))
        assert torch.equal(data[SampleKey(3, key)]["pixel_values"], expected)


def test_small_images_are_not_enlarged_before_they_are_cropped(folder: Path):
    data = opened(folder, crop_scale=0.5)
    image = load_rgb(folder / "2.png")  # 16 × 16
    for key in range(5):
        crop = crop_geometry((16, 16), center_crop=True, random_flip=False, key=key, crop_scale=0.5)
        expected = to_tensor(apply_geometry(image, crop, 16, "lanczos"))
        assert torch.equal(data[SampleKey(2, key)]["pixel_values"], expected)


def test_crops_are_the_same_where_there_is_no_memory_for_the_squares(folder: Path, monkeypatch):
    data = opened(folder, crop_scale=0.4, random_flip=True)
    monkeypatch.setattr(pixel_cache, "MOST_BYTES", 0)
    without = opened(folder, crop_scale=0.4, random_flip=True)
    for row in range(4):
        for key in range(5):
            expected = without[SampleKey(row, key)]["pixel_values"]
            assert torch.equal(data[SampleKey(row, key)]["pixel_values"], expected)


def test_without_augmentation_the_whole_square_is_seen(folder: Path):
    data = opened(folder, crop_scale=0.5, random_flip=True).without_augmentation()
    for row in range(4):
        image = load_rgb(folder / f"{row}.png")
        place = crop_geometry(image.size, center_crop=True, random_flip=False, key=0)
        expected = to_tensor(apply_geometry(image, place, 16, "lanczos"))
        values = {data[SampleKey(row, key)]["pixel_values"].numpy().tobytes() for key in range(5)}
        assert len(values) == 1
        assert (data[SampleKey(row, 0)]["pixel_values"] - expected).abs().max() < 0.4  # reduced in two steps


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_share_the_memory():
    cache = PixelCache(3, 16)
    if (child := os.fork()) == 0:
        cache.put(1, np.full((4, 4, 3), 7, np.uint8))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert cache.get(0) is None
    assert cache.get(1).shape == (4, 4, 3)
    assert (cache.get(1) == 7).all()
    cache.put(2, np.full((2, 8, 3), 5, np.uint8))
    assert cache.get(2).shape == (2, 8, 3)
    assert (cache.get(2) == 5).all()


def test_a_copy_in_another_process_begins_empty():
    cache = PixelCache(3, 16)
    cache.put(1, np.full((4, 4, 3), 7, np.uint8))
    assert pickle.loads(pickle.dumps(cache)).get(1) is None


def test_a_collection_that_is_too_large_is_not_cached():
    assert PixelCache.of(10**9, 256**2) is None
    assert PixelCache.of(100, 64**2) is not None
