"""Collapse detection on real images: it warns about what a person would call collapsed, and about nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training.metrics.collapse import collapse_warnings, pairwise_distances, variation

SHARED = Path(__file__).resolve().parent.parent.parent.parent / "shared"


def one_color(color: tuple[int, ...], size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), color[:3])


def noisy(image: Image.Image, generator: np.random.Generator, scale: float = 12.0) -> Image.Image:
    values = np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float64)
    return Image.fromarray(np.clip(values + generator.normal(0, scale, values.shape), 0, 255).astype(np.uint8))


def plain_posters(count: int, seed: int = 0) -> list[Image.Image]:
    """The plainest posters: a flat background and one bar."""
    generator = random.Random(seed)
    posters = []
    for _ in range(count):
        background, ink = ([generator.randrange(256) for _ in range(3)] for _ in range(2))
        poster = one_color(tuple(background))
        ImageDraw.Draw(poster).rectangle((8, 8, 8 + generator.randrange(16, 48), 12), fill=tuple(ink))
        posters.append(poster)
    return posters


def similar_posters(count: int, seed: int = 0) -> list[Image.Image]:
    """Posters of one layout and one palette, which differ only in the length of the bar."""
    generator = random.Random(seed)
    posters = []
    for _ in range(count):
        poster = one_color((240, 232, 214))
        ImageDraw.Draw(poster).rectangle((8, 8, generator.randrange(40, 56), 18), fill=(30, 60, 160))
        posters.append(poster)
    return posters


def photographs(name: str, count: int) -> list[Image.Image]:
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    files = sorted(folder.rglob("images/*.png")) or sorted(folder.rglob("*.png"))
    random.Random(0).shuffle(files)
    return [Image.open(file).convert("RGB") for file in files[:count]]


@pytest.fixture(scope="module", params=["noto_emoji", "nlvr_shapes", "plain_posters"])
def real_images(request) -> list[Image.Image]:
    return plain_posters(200) if request.param == "plain_posters" else photographs(request.param, 200)


def test_closed_forms():
    black_and_white = np.zeros((1, 32, 32, 3), np.float32)
    black_and_white[:, :16] = 1
    thumbnails = np.concatenate([black_and_white, np.zeros_like(black_and_white)]).reshape(2, -1)
    assert variation(thumbnails) == pytest.approx([0.5, 0.0])
    assert pairwise_distances(thumbnails)[0, 1] == pytest.approx(0.5**0.5)
    assert pairwise_distances(thumbnails)[0, 0] == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 16])
def test_training_images_give_no_warning(real_images, count):
    generator = random.Random(count)
    for _ in range(20):
        drawn = generator.sample(real_images, count + 32)
        assert collapse_warnings(drawn[:count], drawn[count:]) == []


@pytest.mark.parametrize("count", [4, 16])
def test_images_of_one_colour_are_detected(count):
    generator = np.random.default_rng(0)
    for references in (photographs("noto_emoji", 64), photographs("nlvr_shapes", 64)):
        colors = [one_color(tuple(int(v) for v in generator.integers(0, 256, 3))) for _ in range(count)]
        (warning,) = collapse_warnings([noisy(image, generator) for image in colors], references)
        assert "nearly one colour each" in warning
        assert "--learning_rate" in warning


def test_black_images_are_detected_even_for_plain_posters():
    (warning,) = collapse_warnings([one_color((0, 0, 0))] * 8, plain_posters(64))
    assert "0.000" in warning


@pytest.mark.parametrize("count", [3, 8])
def test_the_same_image_for_all_prompts_is_detected(real_images, count):
    generator = np.random.default_rng(0)
    previews = [noisy(real_images[100], generator) for _ in range(count)]
    captions = [f"prompt {number}" for number in range(count)]
    (warning,) = collapse_warnings(previews, real_images[:64], captions, conditions=["captions"])
    assert "all alike" in warning
    assert "captions are ignored" in warning


def test_the_mean_of_all_training_images_is_detected():
    emoji = photographs("noto_emoji", 200)
    mean = np.mean([np.asarray(image.resize((64, 64)), dtype=np.float64) for image in emoji], axis=0)
    generator = np.random.default_rng(0)
    previews = [noisy(Image.fromarray(mean.astype(np.uint8)), generator) for _ in range(8)]
    assert "all alike" in collapse_warnings(previews, emoji[:64])[0]


def test_similar_training_images_allow_similar_previews():
    posters = similar_posters(60)
    assert collapse_warnings(posters[:8], posters[8:], ["a poster"] * 8) == []
    assert collapse_warnings(posters[:8], posters[8:]) == []


def test_one_prompt_allows_similar_images_but_not_a_single_image():
    emoji = photographs("noto_emoji", 80)
    generator = np.random.default_rng(0)
    one_prompt = ["grinning face"] * 8
    variants = [noisy(emoji[70].rotate(int(angle), fillcolor="white"), generator) for angle in range(-32, 32, 8)]
    assert collapse_warnings(variants, emoji[:64], one_prompt) == []
    assert collapse_warnings([emoji[70]] * 8, emoji[:64], one_prompt) != []


def test_two_prompts_with_two_images_each_are_compared_across_prompts():
    emoji = photographs("noto_emoji", 80)
    pairs = [emoji[70], emoji[70], emoji[75], emoji[75]]
    assert collapse_warnings(pairs, emoji[:64], ["a", "a", "b", "b"]) == []


@pytest.mark.parametrize("references", [0, 1, 3])
def test_too_few_references_give_no_warning(references):
    assert collapse_warnings([one_color((0, 0, 0))] * 8, plain_posters(references)) == []


def test_without_previews_there_is_no_warning():
    assert collapse_warnings([], plain_posters(8)) == []


def test_transparent_and_grey_images_of_any_size():
    references = [image.convert("RGBA").resize((40, 60)) for image in plain_posters(16)]
    assert collapse_warnings([image.convert("L") for image in plain_posters(8, seed=1)], references) == []
