"""Tests that the feature maps (F_Tensor) match the drawn poster: flat pixels, keylines, bands, overprints, text."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_scripts.posters.brief import PosterBrief, draw_brief
from data_scripts.posters.elements import UNITS, Element, Scene, TextLines, Title, circle, rectangle
from data_scripts.posters.painting.drawing import KEYLINE, draw_poster
from data_scripts.posters.records import PosterOptions, Row, make_row
from pipelines.common.poster_domain import COLOR_ROLES, rgb_color

ROLE = {name: number for number, name in enumerate(COLOR_ROLES)}


def image_array(row: Row, name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row[name]["bytes"])))


def some_brief(**changes: object) -> PosterBrief:
    return replace(draw_brief(np.random.default_rng(0)), **changes)


def maps_of(brief: PosterBrief, elements: list[Element], resolution: int = 64) -> dict[str, np.ndarray]:
    maps = draw_poster(brief, elements, resolution, "plain", seed=0).maps
    return {name: np.asarray(getattr(maps, name)) for name in ("text_mask", "image_mask", "color_role", "hierarchy")}


@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_every_flat_pixel_has_the_color_of_its_role(resolution: int) -> None:
    """Flat pixels have exactly a colour of the palette: background, shapes, letters, bars of small text, keylines."""
    for index in range(40 if resolution < 256 else 15):
        row = make_row(PosterOptions(5, resolution, "plain"), index)
        background, primary, *others, ink = (rgb_color(code) for code in row["palette"])
        accent = others[0] if others else (0, 0, 0)
        colors = np.array([background, (0, 0, 0), primary, (0, 0, 0), accent, ink])
        image, roles = image_array(row, "image"), image_array(row, "color_role")
        flat = (image[:, :, None] == np.array([background, primary, *others, ink])).all(-1).any(-1)
        flat &= roles != ROLE["surface"]
        assert flat.mean() > 0.4
        assert (colors[roles] == image).all(-1)[flat].all(), row["text"]


@pytest.mark.parametrize("complexity", ["plain", "standard", "rich"])
def test_accent_is_named_only_where_there_is_one(complexity: str) -> None:
    seen = set()
    for index in range(60):
        row = make_row(PosterOptions(3, 64, complexity), index)
        has_accent = len(row["palette"]) == 4
        named = {element["role"] for element in row["elements"]}
        marked = ROLE["accent"] in image_array(row, "color_role")
        assert has_accent or not ("accent" in named or marked), row["text"]
        seen |= {(has_accent, marked)}
    assert {(True, True), (False, False)} <= seen


def test_transparent_overprints_are_secondary_and_keep_masks() -> None:
    brief = some_brief(accent=None, style="pop")
    shape = (circle(8, 8, 3, "primary"),)
    over = (rectangle(4, 4, 12, 12, "secondary"),)
    elements = [
        Element("picture", "surface", 0.7, (0, 0, 6, 6), Scene("city", 1)),
        Element("shape", "primary", 0.5, (5, 5, 11, 11), shape),
        Element("shape", "secondary", 0.35, (4, 4, 12, 12), over, opacity=0.55),
    ]
    maps = maps_of(brief, elements)
    inside = np.s_[16:48, 16:48]
    assert (maps["color_role"][inside] == ROLE["secondary"]).all()
    assert (maps["hierarchy"][inside] == round(0.35 * 255)).all()
    assert (maps["image_mask"][16:20, 16:20] == 255).all()


def test_covered_elements_are_cleared_in_the_maps() -> None:
    """An opaque shape, including its holes, covers a picture, and a title's band covers everything."""
    picture_box = (0.0, 0.0, 16.0, 16.0)
    rings = (rectangle(4, 4, 12, 12, "primary"), rectangle(6, 6, 10, 10, "background"))
    title = Element("title", "ink", 1.0, (2, 0.5, 14, 3.5), Title("IRON", "DejaVuSansMono-Bold", inverted=True))
    elements = [
        Element("picture", "surface", 0.7, picture_box, Scene("portrait", 1)),
        Element("shape", "primary", 0.5, (3, 3, 13, 13), rings),
        title,
    ]
    maps = maps_of(some_brief(title_position="top"), elements)
    expected = np.full((64, 64), 255)
    expected[16:48, 16:48] = 0
    expected[:16] = 0
    assert np.array_equal(maps["image_mask"], expected)
    assert (maps["hierarchy"][25:39, 25:39] == 0).all()
    assert (maps["color_role"][25:39, 25:39] == ROLE["background"]).all()
    band = maps["hierarchy"][:16].copy()
    assert (band[2:14, 8:56] == 255).all()
    band[2:14, 8:56] = 0
    assert not band.any()
    assert set(np.unique(maps["color_role"][:16])) == {ROLE["background"], ROLE["ink"]}


@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_pictures_have_a_keyline_of_ink(resolution: int) -> None:
    brief = some_brief()
    elements = [Element("picture", "surface", 0.7, (2.5, 4.5, 9.5, 9.5), Scene("seascape", 3))]
    drawn = draw_poster(brief, elements, resolution, "plain", seed=0)
    unit, line = resolution // UNITS, round(KEYLINE * resolution / UNITS)
    x0, y0, x1, y1 = (round(value * unit) for value in (2.5, 4.5, 9.5, 9.5))
    expected = np.zeros((resolution, resolution), dtype=np.uint8)
    expected[y0:y1, x0:x1] = ROLE["ink"]
    keyline = expected == ROLE["ink"]
    expected[y0 + line : y1 - line, x0 + line : x1 - line] = ROLE["surface"]
    keyline &= expected == ROLE["ink"]
    assert np.array_equal(np.asarray(drawn.maps.color_role), expected)
    assert (np.asarray(drawn.image)[keyline] == brief.color_of("ink")).all()
    assert (np.asarray(drawn.maps.image_mask)[y0:y1, x0:x1] == 255).all()


@pytest.mark.parametrize("resolution", [64, 128])
def test_bars_of_small_text_are_ink_all_over(resolution: int) -> None:
    elements = [Element("text", "ink", 0.25, (2, 4, 6, 8), TextLines((1.0, 1.0, 1.0, 0.5), "left"))]
    maps = maps_of(some_brief(), elements, resolution)
    unit = resolution // UNITS
    assert np.array_equal(maps["color_role"] == ROLE["ink"], maps["text_mask"] == 255)
    assert (maps["text_mask"] == 255).sum() == 3.5 * 4 * unit * unit // 2


def test_lines_of_small_text_are_as_wide_as_their_words() -> None:
    for seed, align in ((0, "left"), (1, "left"), (2, "center"), (3, "center")):
        elements = [Element("text", "ink", 0.25, (2, 4, 6, 8), TextLines((1.0, 1.0, 1.0, 0.5), align))]
        drawn = draw_poster(some_brief(), elements, 256, "plain", seed)
        ink, lines = np.asarray(drawn.maps.color_role) == ROLE["ink"], np.asarray(drawn.maps.text_mask) == 255
        assert 0.1 < ink[lines].mean() < 0.7  # letters, with the background between them
        assert ink[~lines].sum() < 0.15 * ink.sum()  # only descenders
        for top in (68, 84, 100, 116):
            line, words = lines[top + 2], ink[top - 2 : top + 10].any(axis=0)
            ends, letters = np.flatnonzero(line), np.flatnonzero(words)
            assert abs(int(ends[-1]) - int(letters[-1])) <= 3
            assert abs(int(ends[0]) - int(letters[0])) <= 3


PLAIN_MEAN_COLORS: dict[int, list[tuple[float, float, float]]] = {
    64: [(92.6, 64.4, 70.4), (202.9, 171.6, 50.3), (201.1, 64.1, 67.4)],
    128: [(92.3, 64.4, 70.4), (202.9, 171.6, 50.3), (201.2, 64.2, 67.5)],
}


@pytest.mark.parametrize("resolution", sorted(PLAIN_MEAN_COLORS))
def test_plain_posters_have_the_colors_of_the_first_format(resolution: int) -> None:
    """Mean colours of posters 0 to 2 of seed 0 equal those of format 1 of the data, which had other maps."""
    for index, expected in enumerate(PLAIN_MEAN_COLORS[resolution]):
        image = image_array(make_row(PosterOptions(0, resolution, "plain"), index), "image")
        assert image.mean(axis=(0, 1)) == pytest.approx(expected, abs=0.5)
