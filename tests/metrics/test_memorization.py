"""Copies of training images are found, and new images are not taken for copies."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.tools.cli import UserError
from tests.support.runs import ROOT
from training.metrics.memorization import (
    CopySearch,
    calibrated_threshold,
    check_memorization,
    compare_pixels,
    compute_sample_similarity,
    contact_sheet,
    replay_report,
    replay_verdict,
    verdict,
    wilson_interval,
)
from training.metrics.neighbours import NeighbourSearch, thumbnails, views


def pictures(count: int, seed: int, size: int = 64) -> list[Image.Image]:
    """Smooth random images."""
    random = np.random.default_rng(seed)
    small = [Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((size, size), Image.Resampling.BICUBIC) for image in small]


def nearest(queries: torch.Tensor, *blocks: torch.Tensor, neighbours: int = 9):
    search = NeighbourSearch([queries], neighbours=neighbours)
    for block in blocks:
        search.add(block)
    return search.result()


def test_the_search_in_blocks_equals_a_full_sort():
    torch.manual_seed(0)
    queries, training = torch.randn(7, 5) + 40, torch.randn(10_000, 5) + 40
    found = nearest(queries, training)
    full = torch.cdist(queries.double(), training.double())
    assert torch.equal(found.rows, full.argsort(1)[:, :9])
    torch.testing.assert_close(found.distances.double(), full.sort(1).values[:, :9], rtol=1e-5, atol=1e-5)
    assert torch.equal(nearest(queries, *training.split(999)).rows, found.rows)


def test_fewer_training_images_than_neighbours():
    assert nearest(torch.zeros(2, 3), torch.ones(4, 3), neighbours=50).rows.shape == (2, 4)
    with pytest.raises(ValueError, match="training images is 0"):
        nearest(torch.zeros(2, 3))


def changed(training: list[Image.Image]) -> list[Image.Image]:
    """60 copies: as they are, mirrored and moved."""
    return [
        *training[:20],
        *(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in training[20:40]),
        *(image.transform(image.size, Image.Transform.AFFINE, (1, 0, 2, 0, 1, -2)) for image in training[40:60]),
    ]


@pytest.mark.parametrize("with_held_out", [True, False])
def test_copies_are_found_mirrored_and_moved_and_new_images_are_none(with_held_out):
    training, new, held_out = pictures(300, 0), pictures(200, 1), pictures(200, 2)
    reference = thumbnails(training)
    calibration = thumbnails(held_out) if with_held_out else None
    copied = compare_pixels(thumbnails(changed(training)), reference, calibration)
    assert copied.neighbours.rows[:, 0].tolist() == list(range(60))
    assert copied.report.copies == 60
    assert copied.report.exact_copies >= 40
    assert copied.report.exceeds(0.01)
    assert copied.is_copy.all()
    assert verdict([copied.report]).startswith("there are signs of copied training images: 60 of 60")
    fresh = compare_pixels(thumbnails(new), reference, calibration)
    assert fresh.report.copy_rate <= 0.04
    assert fresh.report.exact_copies == 0
    assert not fresh.report.exceeds(0.01)
    assert "no sign of copied training images so far" in verdict([fresh.report.to_json()])
    assert ("held-out" in fresh.report.calibrated_on) == with_held_out


def test_duplicates_in_the_data_do_not_hide_copies():
    """The ratio of a duplicate is 0: as a threshold, it would call no image a copy."""
    training = pictures(200, 0)
    training += training[:10]
    samples, others = thumbnails(training[100:120]), pictures(120, 2)
    report = compare_pixels(samples, thumbnails(training)).report
    assert (report.num_held_out, report.duplicates, report.copies) == (190, 20, 20)
    report = compare_pixels(samples, thumbnails(training), thumbnails(others + training[30:50])).report
    assert (report.num_held_out, report.duplicates, report.copies) == (120, 20, 20)
    report = compare_pixels(samples, thumbnails(training), thumbnails(training[:150])).report
    assert (report.num_held_out, report.duplicates, report.false_positive_rate) == (0, 150, 1)


def test_samples_may_be_images_tensors_or_batches():
    training, samples = pictures(60, 0), pictures(3, 0)[:2] + pictures(1, 5)
    tensor = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in training])
    batches = [{"pixel_values": part} for part in tensor.split(7)]
    expected = compute_sample_similarity(samples, training)
    assert expected.is_copy.tolist() == [True, True, False]
    for data in (tensor, batches, [training[:30], training[30:]]):
        found = compute_sample_similarity(samples, data)
        assert torch.equal(found.neighbours.rows, expected.neighbours.rows)
        assert found.report == expected.report
    with pytest.raises(ValueError, match="0 generated and 60 training images"):
        compute_sample_similarity([], training)


def test_sets_are_judged_by_one_threshold_while_training_images_arrive():
    training, held_out = thumbnails(pictures(300, 0)), thumbnails(pictures(120, 2))
    sets = {"new": thumbnails(pictures(40, 1)), "copied": training[200:220]}
    search = CopySearch("pixels", sets, held_out)
    for batch in training.split(64):
        search.add(batch)
    found = search.results(search.duplicates())
    for name, samples in sets.items():
        alone = compare_pixels(samples, training, held_out)
        assert found[name].report == alone.report
        assert torch.equal(found[name].neighbours.rows, alone.neighbours.rows)


def test_a_caption_returns_its_image_if_that_is_the_copied_one():
    training = thumbnails(pictures(100, 0))
    search = CopySearch("pixels", {"replayed": training[:10]}, thumbnails(pictures(120, 2)))
    search.add(training)
    similar = search.results(search.duplicates())["replayed"]
    report = replay_report(similar, torch.tensor([True] * 6 + [False] * 4))  # four return the image of another caption
    assert (report.returned, report.nearest, report.rate) == (6, 6, 0.6)
    assert report.lowest_rate < 0.6 < report.highest_rate
    assert "of 10 training images, the model returned 6 of these images (60.0%) in pixels" in replay_verdict([report])


def test_the_closest_pairs_are_drawn_side_by_side():
    training = pictures(60, 0)
    samples = [*pictures(5, 9), training[17], training[17], training[3]]
    similarity = compute_sample_similarity(samples, training)
    nearest = similarity.closest(2)
    assert sorted(similarity.neighbours.rows[nearest, 0].tolist()) == [3, 17]
    sheet = contact_sheet(similarity, samples, training.__getitem__, 2)
    assert sheet.width > 300


class Repeater:
    """A pipeline that returns its training images, as an overfitted model does."""

    def __init__(self, images: list[Image.Image]):
        self.images = images

    def __call__(self, prompt, generator):
        shown = [self.images[int(text)] for text in prompt]
        return type("Output", (), {"images": shown})


def test_a_model_that_repeats_its_training_images_is_caught():
    training = pictures(40, 0)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in training])
    captions = [str(i) for i in range(40)]
    batches = [{"pixel_values": pixels[i : i + 8], "caption": captions[i : i + 8]} for i in range(0, 40, 8)]
    copied = check_memorization(Repeater(training), batches, num_generate=30)
    assert copied.report.copies == copied.report.exact_copies == 30
    fresh = check_memorization(Repeater(pictures(40, 1)), batches, num_generate=30)
    assert not fresh.report.exceeds(0.01)
    with pytest.raises(UserError, match="needs caption"):
        check_memorization(Repeater(training), [{"pixel_values": pixels}])


def test_views_are_those_of_mirrored_and_moved_images():
    small = thumbnails(pictures(2, 3))
    everything = views(small)
    assert len(everything) == 18
    assert torch.equal(everything[0], small)
    grid = small.reshape(2, 32, 32, 3)
    assert torch.equal(everything[1], grid.flip(2).flatten(1))
    moved = torch.cat([grid[:, :, 1:], grid[:, :, -1:]], 2).flatten(1)
    assert sum(torch.equal(view, moved) for view in everything) == 1


def test_the_false_positive_rate_is_the_stated_one():
    torch.manual_seed(0)
    rates = []
    for _ in range(200):
        threshold, stated = calibrated_threshold(torch.rand(199), 0.01)
        rates.append(float((torch.rand(2000) < threshold).double().mean()))
    assert stated == 2 / 200
    assert np.mean(rates) == pytest.approx(stated, rel=0.2)
    assert calibrated_threshold(torch.rand(9), 0.01)[1] == 0.1


def test_the_false_positive_rate_without_held_out_images_is_the_stated_one():
    reports = [
        compare_pixels(thumbnails(pictures(60, 200 + seed, 8)), thumbnails(pictures(60, 100 + seed, 8))).report
        for seed in range(20)
    ]
    assert reports[0].false_positive_rate == 1 / 31
    assert np.mean([report.copy_rate for report in reports]) == pytest.approx(1 / 31, abs=0.02)


def test_wilson_interval_of_known_values():
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)


LATENTS = """
import sys, torch
from training.core.memory import peak_resident_bytes
from training.metrics.memorization import CopySearch

queries, images = map(int, sys.argv[1:])
before = peak_resident_bytes()
torch.manual_seed(0)
sets = {"generated": torch.randn(queries, 16 * 16 * 4)}
search = CopySearch("latents", sets, torch.randn(1000, 16 * 16 * 4))
for _ in range(images // 1000):
    search.add(torch.randn(1000, 16 * 16 * 4))
report = search.results(torch.zeros(1000, dtype=torch.bool))["generated"].report
assert (report.num_images, report.num_training) == (queries, images)
print((peak_resident_bytes() - before) / 2**30)
"""


@pytest.mark.parametrize("images", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])
@pytest.mark.slow
def test_ten_thousand_latents_are_compared_with_a_million_within_two_gigabytes(images):
    words = [sys.executable, "-c", LATENTS, "10000", str(images)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    print(done.stdout)
    assert float(done.stdout) < 2
