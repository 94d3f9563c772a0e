"""The reader of posters: correct for real posters, robust to small flaws, and not misled by other images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data_scripts.posters.records import PosterOptions, make_row
from pipelines.common.poster_domain import COLORS, TITLE_POSITIONS, hex_color
from training.metrics.posters import (
    background_color_name,
    count_pictures,
    find_pictures,
    measure_posters,
    palette_share,
    read_title_position,
)

HELD_OUT = 150
SHARES = ("background_color_share", "title_position_share", "picture_count_share")


def poster_of(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


@pytest.fixture(scope="module")
def briefs() -> list[dict]:
    return [make_row(PosterOptions(seed=2024, resolution=64, complexity="plain"), index) for index in range(HELD_OUT)]


@pytest.fixture(scope="module")
def posters(briefs: list[dict]) -> list[np.ndarray]:
    return [poster_of(brief) for brief in briefs]


def test_real_posters_are_read_correctly(briefs: list[dict], posters: list[np.ndarray]) -> None:
    measured = measure_posters(posters, briefs, posters)
    for name in SHARES:
        assert measured[name] >= 0.98
        assert measured[f"reader_{name}_real"] == measured[name]
    assert measured["palette_share_ratio"] == pytest.approx(1.0)
    assert measured["palette_share_ratio_standard_error"] == pytest.approx(0.0)


@pytest.mark.parametrize("resolution", [128, 256])
def test_larger_posters_are_read_too(resolution: int) -> None:
    rows = [make_row(PosterOptions(7, resolution, "plain"), index) for index in range(40)]
    measured = measure_posters([poster_of(row) for row in rows], rows, [poster_of(row) for row in rows])
    assert min(measured[name] for name in SHARES) >= 0.95


def test_small_flaws_are_tolerated(briefs: list[dict], posters: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    flawed = []
    for poster in posters:
        soft = np.asarray(Image.fromarray(poster).filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float64)
        flawed.append(np.clip(soft + rng.normal(0, 8, soft.shape), 0, 255).astype(np.uint8))
    measured = measure_posters(flawed, briefs, posters)
    assert min(measured[name] for name in SHARES) >= 0.95
    assert measured["palette_share_ratio"] < 0.95  # blurred edges have colours outside the palette


def test_noise_scores_low(briefs: list[dict], posters: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, poster.shape, dtype=np.uint8) for poster in posters]
    measured = measure_posters(noise, briefs, posters)
    assert measured["background_color_share"] < 0.2
    assert measured["palette_share_ratio"] < 0.2
    assert measured["title_position_share"] == measured["picture_count_share"] == 0.0


def test_blank_posters_have_no_title_and_no_pictures(briefs: list[dict], posters: list[np.ndarray]) -> None:
    blank = [np.full_like(poster, COLORS[brief["background"]]) for poster, brief in zip(posters, briefs)]
    measured = measure_posters(blank, briefs, posters)
    assert measured["title_position_share"] == 0.0
    assert measured["picture_count_share"] == np.mean([brief["pictures"] == 0 for brief in briefs]) < 0.4


def test_posters_of_other_briefs_score_low(briefs: list[dict], posters: list[np.ndarray]) -> None:
    measured = measure_posters(posters[1:] + posters[:1], briefs, posters)
    assert max(measured[name] for name in SHARES) < 0.4
    assert measured["palette_share_ratio"] < 0.7


def test_the_reader_follows_the_poster_not_the_brief(briefs: list[dict], posters: list[np.ndarray]) -> None:
    for brief, poster in zip(briefs, posters):
        elsewhere = TITLE_POSITIONS[(TITLE_POSITIONS.index(brief["title_position"]) + 1) % 3]
        other_brief = {**brief, "title_position": elsewhere, "pictures": 3 - brief["pictures"]}
        assert read_title_position(poster, other_brief) == read_title_position(poster, brief) != elsewhere
        assert count_pictures(poster, other_brief) == count_pictures(poster, brief)


def test_turning_the_page_upside_down_moves_the_title(briefs: list[dict], posters: list[np.ndarray]) -> None:
    moved = {"top": "bottom", "middle": "middle", "bottom": "top"}
    correct = [
        read_title_position(poster[::-1].copy(), brief) == moved[brief["title_position"]]
        for poster, brief in zip(posters, briefs)
    ]
    assert np.mean(correct) >= 0.98


def test_pictures_painted_over_are_not_counted(briefs: list[dict], posters: list[np.ndarray]) -> None:
    for brief, poster in zip(briefs, posters):
        boxes = [element for element in brief["elements"] if element["kind"] == "picture"]
        if not boxes:
            continue
        x0, y0, x1, y1 = (round(64 * boxes[0][name]) for name in ("x0", "y0", "x1", "y1"))
        without = poster.copy()
        without[y0:y1, x0:x1] = COLORS[brief["background"]]
        assert count_pictures(without, brief) == brief["pictures"] - 1


def test_detected_pictures_are_where_they_were_drawn(briefs: list[dict], posters: list[np.ndarray]) -> None:
    for brief, poster in zip(briefs, posters):
        drawn = sorted(
            tuple(64 * element[name] for name in ("x0", "y0", "x1", "y1"))
            for element in brief["elements"]
            if element["kind"] == "picture"
        )
        detected = find_pictures(poster)
        assert len(detected) == len(drawn)
        for drawn_box, detected_box in zip(drawn, detected):
            assert np.abs(np.array(drawn_box) - np.array(detected_box)).max() <= 5  # a dark corner or the frame


def test_palette_share_in_closed_form() -> None:
    red, cream = COLORS["red"], COLORS["cream"]
    poster = np.full((64, 64, 3), cream, dtype=np.uint8)
    poster[:16] = red
    assert palette_share(poster, [hex_color(cream)]) == pytest.approx(0.75)
    assert palette_share(poster, [hex_color(cream), hex_color(red)]) == 1.0
    poster[:16] = np.array(red) + (39, 0, 0)  # within 40
    assert palette_share(poster, [hex_color(red)]) == pytest.approx(0.25)
    poster[:16] = np.array(red) + (41, 0, 0)
    assert palette_share(poster, [hex_color(red)]) == 0.0


def test_only_regions_that_look_like_pictures_are_left_out() -> None:
    palette = [hex_color(COLORS["cream"])]
    poster = np.full((64, 64, 3), COLORS["cream"], dtype=np.uint8)
    poster[16:32, 16:32] = (129, 150, 177)  # the pictures' monochrome
    assert find_pictures(poster) == [(16, 16, 32, 32)]
    assert palette_share(poster, palette) == 1.0
    poster[16:32, 16:32] = (128, 128, 20)  # mud
    assert find_pictures(poster) == []
    assert palette_share(poster, palette) == pytest.approx(1 - 1 / 16)


def test_background_of_a_flat_page_is_named() -> None:
    for name, color in COLORS.items():
        assert background_color_name(np.full((64, 64, 3), color, dtype=np.uint8)) == name


def test_torch_and_pillow_images_are_read_the_same(briefs: list[dict], posters: list[np.ndarray]) -> None:
    for brief, poster in zip(briefs[:5], posters[:5]):
        for other in (torch.from_numpy(poster.copy()), Image.fromarray(poster)):
            assert read_title_position(other, brief) == read_title_position(poster, brief)
            assert palette_share(other, brief["palette"]) == palette_share(poster, brief["palette"])


def test_invalid_arguments_are_refused(briefs: list[dict], posters: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="expected the same number .* got 2, 3 and 3"):
        measure_posters(posters[:2], briefs[:3], posters[:3])
    with pytest.raises(ValueError, match="at least 1"):
        measure_posters([], [], [])
    with pytest.raises(ValueError, match=r"got shape \(3, 64, 64\)"):
        count_pictures(np.zeros((3, 64, 64), dtype=np.uint8), briefs[0])


def test_standard_errors() -> None:
    row = make_row(PosterOptions(0, 64, "plain"), 0)
    poster = poster_of(row)
    wrong = np.zeros_like(poster)
    measured = measure_posters([poster, wrong, wrong, poster], [row] * 4, [poster] * 4)
    assert measured["picture_count_share"] == 0.5
    assert measured["picture_count_share_standard_error"] == pytest.approx(0.25)
