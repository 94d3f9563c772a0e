"""Aspect buckets: their sizes, which images they get, and how images are cropped to them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.tools.cli import UserError
from training.core.draws import SampleKey
from training.data import source as data_source
from training.data.aspect_buckets import AspectBuckets, BucketRule, make_buckets
from training.data.images import DataConfig, ImageDataset, load_split
from training.data.transforms import crop_geometry

PHOTOGRAPHS = [(300, 200)] * 30 + [(200, 300)] * 50 + [(400, 400)] * 20 + [(320, 180)] * 3


def test_a_bucket_has_about_the_pixels_of_the_square_and_the_ratio_of_its_images():
    buckets = make_buckets(PHOTOGRAPHS, BucketRule(256, 16))
    assert buckets.sizes == ((320, 208), (208, 320), (256, 256), (192, 336))  # by number of images
    for height, width in buckets.sizes:
        assert height % 16 == width % 16 == 0
        assert abs(height * width / 256**2 - 1) < 0.05


def test_a_bucket_with_too_few_images_joins_its_nearest_neighbour():
    rule = BucketRule(256, 16, least_images=4)
    assert make_buckets(PHOTOGRAPHS, rule).sizes == ((320, 208), (208, 320), (256, 256))
    assert len(make_buckets(PHOTOGRAPHS, BucketRule(256, 16, least_images=1000)).sizes) == 1
    # Two small neighbours are large enough together.
    similar = [(300, 200)] * 3 + [(340, 200)] * 3
    assert len(make_buckets(similar, BucketRule(256, 8)).sizes) == 2
    assert len(make_buckets([*similar, *[(100, 300)] * 6], BucketRule(256, 8, 6)).sizes) == 2


def test_no_side_is_below_four_cells_of_the_deepest_map():
    buckets = make_buckets([(1000, 10), (10, 1000), (100, 100)], BucketRule(64, 8))
    assert sorted(buckets.sizes) == [(32, 128), (64, 64), (128, 32)]
    with pytest.raises(
        UserError, match=r"--resolution 64 all images would be squares.*multiples of 16 and at least 64"
    ):
        make_buckets([(1000, 10)], BucketRule(64, 16))


def test_the_nearest_bucket_is_that_of_the_ratio_and_not_of_the_difference():
    buckets = AspectBuckets(((100, 100), (50, 200), (200, 50)))
    assert buckets.nearest([(199, 100), (201, 100), (100, 199), (100, 201), (7, 7), (0, 0)]).tolist() == [
        0,
        1,
        0,
        2,
        0,
        0,
    ]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 2), (64, 96), (5, 17)])
def test_a_crop_is_the_largest_rectangle_of_its_ratio_inside_the_image(shape):
    for size in ((300, 200), (200, 300), (101, 100), (33, 470)):
        for key in range(20):
            place = crop_geometry(size, center_crop=False, random_flip=False, key=key, shape=shape)
            assert 0 <= place.left <= size[0] - place.width
            assert 0 <= place.top <= size[1] - place.height
            assert place.width == size[0] or place.height == size[1]
            # Whole pixels, so the ratio is right up to half of one.
            assert abs(place.width - place.height * shape[1] / shape[0]) <= 0.5 * max(1, shape[1] / shape[0])
            inner = crop_geometry(size, center_crop=False, random_flip=False, key=key, shape=shape, crop_scale=0.5)
            assert place.left <= inner.left
            assert inner.left + inner.width <= place.left + place.width
            assert inner.top + inner.height <= place.top + place.height
            assert inner.height >= math.floor(0.5 * place.height)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four upright images, three wide ones, and one that only its EXIF orientation makes wide."""
    path = tmp_path / "images"
    path.mkdir()
    lines = []
    for row in range(8):
        size = (20, 30) if row < 4 or row == 7 else (30, 20)
        noise = np.random.default_rng(row).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image, exif = Image.fromarray(noise), Image.Exif()
        exif[0x0112] = 6 if row == 7 else 1
        image.save(path / f"{row}.png", exif=exif)
        lines.append(json.dumps({"file_name": f"{row}.png", "text": str(row)}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def opened(folder: Path, **options: object) -> ImageDataset:
    config = DataConfig(train_data_dir=str(folder), validation_fraction=0.0, resolution=16, **options)
    return ImageDataset(load_split(config, "train", 0), config, captions=False)


def test_rows_get_the_size_of_their_upright_image(folder):
    data = opened(folder)
    assert data.image_sizes() == [(20, 30)] * 4 + [(30, 20)] * 4
    assert opened(folder).image_sizes() == data.image_sizes()  # from the record
    data.put_in_buckets(make_buckets(data.image_sizes(), BucketRule(16, 2)))
    assert data.sizes == ((14, 20), (20, 14))
    assert data.batch_groups.tolist() == [1] * 4 + [0] * 4
    for row in range(8):
        item = data[SampleKey(row, row)]
        assert item["pixel_values"].shape == ((3, 20, 14) if row < 4 else (3, 14, 20))


def test_a_changed_file_is_measured_again(folder):
    assert opened(folder).image_sizes()[0] == (20, 30)
    Image.new("RGB", (50, 10)).save(folder / "0.png")
    data_source._open_source.cache_clear()
    assert opened(folder).image_sizes()[0] == (50, 10)


@pytest.mark.parametrize("options", [{}, {"center_crop": False}, {"crop_scale": 0.5}])
def test_rectangles_in_memory_are_those_of_the_files(folder, options):
    data = opened(folder, **options)
    data.put_in_buckets(AspectBuckets(((14, 20), (20, 14))))
    first = [data[SampleKey(row, 3)]["pixel_values"] for row in range(8)]
    for file in folder.glob("*.png"):
        if data._kept is not None:
            file.write_bytes(b"")  # the second reading needs no file
    assert (data._kept is None) == (options == {"center_crop": False})
    for row, before in enumerate(first):
        assert torch.equal(data[SampleKey(row, 3)]["pixel_values"], before)


def test_a_broken_image_is_replaced_by_one_of_its_size(folder):
    data = opened(folder, on_bad_sample="skip")
    data.put_in_buckets(AspectBuckets(((14, 20), (20, 14))))
    (folder / "3.png").write_bytes(b"no image")
    item = data[SampleKey(3, 0)]
    assert item["index"] == 0  # the first of the upright images, as no upright image follows
    assert item["pixel_values"].shape == (3, 20, 14)
