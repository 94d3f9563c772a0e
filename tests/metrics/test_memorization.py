"""Copies of training images are found, and new images are not taken for copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from training.metrics.memorization import (
    EXACT,
    calibrated_threshold,
    nearest_neighbours,
    pixel_neighbours,
    report,
    thumbnails,
    views,
    wilson_interval,
)


def pictures(count: int, seed: int, size: int = 64) -> list[Image.Image]:
    """Smooth random pictures."""
    random = np.random.default_rng(seed)
    small = [Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((size, size), Image.Resampling.BICUBIC) for image in small]


def test_the_search_in_blocks_equals_a_full_sort():
    torch.manual_seed(0)
    queries, training = torch.randn(7, 5) + 40, torch.randn(10_000, 5) + 40
    found = nearest_neighbours(queries, training, 9)
    full = torch.cdist(queries.double(), training.double())
    assert torch.equal(found.rows, full.argsort(1)[:, :9])
    torch.testing.assert_close(found.distances.double(), full.sort(1).values[:, :9], rtol=1e-5, atol=1e-5)
    streamed = nearest_neighbours(queries, iter(training.split(999)), 9)
    assert torch.equal(streamed.rows, found.rows)


def test_fewer_training_images_than_neighbours():
    found = nearest_neighbours(torch.zeros(2, 3), torch.ones(4, 3), 50)
    assert found.rows.shape == (2, 4)
    with pytest.raises(ValueError, match="no training images"):
        nearest_neighbours(torch.zeros(2, 3), [], 50)


def test_copies_are_found_mirrored_moved_and_compressed():
    training, new, held_out = pictures(300, 0), pictures(200, 1), pictures(200, 2)
    reference = thumbnails(training)
    calibration = pixel_neighbours(held_out, reference)
    changed = [
        *training[:20],
        *(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in training[20:40]),
        *(image.transform(image.size, Image.Transform.AFFINE, (1, 0, 2, 0, 1, -2)) for image in training[40:60]),
    ]
    found = pixel_neighbours(changed, reference)
    assert found.rows[:, 0].tolist() == list(range(60))
    copied = report("pixels", found, calibration, len(training), EXACT)
    assert copied.copies == 60
    assert copied.exact_copies >= 40
    assert copied.exceeds(0.01)
    fresh = report("pixels", pixel_neighbours(new, reference), calibration, len(training), EXACT)
    assert fresh.copy_rate <= 0.04
    assert fresh.exact_copies == 0
    assert not fresh.exceeds(0.01)


def test_views_begin_with_the_images_themselves():
    images = pictures(2, 3)
    all_views = views(images)
    assert len(all_views) == 18
    assert all_views[0] == images
    assert all(view[0].size == (64, 64) for view in all_views)


def test_the_false_positive_rate_is_the_stated_one():
    torch.manual_seed(0)
    rates = []
    for _ in range(200):
        threshold, stated = calibrated_threshold(torch.rand(199), 0.01)
        rates.append(float((torch.rand(2000) < threshold).double().mean()))
    assert stated == 2 / 200
    assert np.mean(rates) == pytest.approx(stated, rel=0.2)
    assert calibrated_threshold(torch.rand(9), 0.01)[1] == 0.1


def test_wilson_interval_of_known_values():
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
