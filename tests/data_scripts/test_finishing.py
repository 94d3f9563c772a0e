"""Tests of what standard posters have and plain ones do not: mounts, duotones in the poster's own colours, paler small
text, rules, and traces of printing and scanning."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import replace

import numpy as np
import PIL
import pytest
from PIL import Image, features

from data_scripts.posters.brief import PosterBrief, draw_brief
from data_scripts.posters.elements import UNITS, Element, Scene, TextLines
from data_scripts.posters.layout import lay_out
from data_scripts.posters.painting.drawing import KEYLINE, draw_poster
from data_scripts.posters.painting.finishing import MOUNTS, finish
from data_scripts.posters.painting.textures import printed_and_scanned
from data_scripts.posters.records import PosterOptions, Row, make_row
from pipelines.common.poster_domain import COLOR_ROLES, COLORS, F_TENSOR_CHANNELS

ROLE = {name: number for number, name in enumerate(COLOR_ROLES)}
PICTURE_BOX = (3.0, 3.0, 11.0, 13.0)

PILLOW = PIL.__version__.split(".")[0]
PLAIN_PIXELS = {
    64: {"any": "0ef09197d264fbc7fc3a5a8e4d4fc23545cdad54a57b2efc3a40492972fd295e"},
    128: {"any": "15c2bdbb1ce296af1d04f115a87f87b4e668e016c61d7f89a5be03fd7b38d464"},
    256: {
        "12": "7e06e4d2d257712c76de586f3fe6a4fce7a886662bd589efd34159e7805b315c",
        "13": "c1748b9a200b9669b5e7addd5a9e13482b45d8dfc6620d5263f7c4553c06b972",
    },
}
"""SHA-256 of the pixels (including the maps) of plain posters 0 to 23 of seed 0 in format 2 of the data, by Pillow's
major version if it makes a difference."""
FREETYPE = "2.14.3"
"""Other versions may draw edges differently. Mean colours are tested with every version."""


def pixels(row: Row, name: str) -> Image.Image:
    return Image.open(io.BytesIO(row[name]["bytes"]))


def finished(seed: int) -> tuple[PosterBrief, list[Element]]:
    rng = np.random.default_rng(seed)
    brief = draw_brief(rng)
    return brief, finish(brief, lay_out(brief, rng, "standard"), np.random.default_rng([seed, 1]))


def rules_of(elements: list[Element]) -> list[Element]:
    return [element for element in elements if element.kind == "shape" and element.role == "ink"]


@pytest.mark.skipif(
    PILLOW not in ("12", "13") or features.version("freetype2") != FREETYPE,
    reason="other versions draw other edges of letters",
)
@pytest.mark.parametrize("resolution", sorted(PLAIN_PIXELS))
def test_plain_posters_are_those_of_the_second_format(resolution: int) -> None:
    digest = hashlib.sha256()
    for index in range(24):
        row = make_row(PosterOptions(0, resolution, "plain"), index)
        for name in ("image", *F_TENSOR_CHANNELS):
            digest.update(pixels(row, name).tobytes())
    expected = PLAIN_PIXELS[resolution]
    assert digest.hexdigest() == expected.get(PILLOW, expected.get("any"))


def test_frequencies_of_mounts_duotones_and_rules() -> None:
    mounts: Counter[str] = Counter()
    rule_counts: Counter[int] = Counter()
    own_colors, ink_shares = [], []
    for seed in range(400):
        _, elements = finished(seed)
        scenes = [element.content for element in elements if isinstance(element.content, Scene)]
        mounts.update(scene.mount for scene in scenes)
        own_colors += [scenes[0].duotone is not None] if scenes else []
        assert len({scene.duotone for scene in scenes}) <= 1  # all pictures of a poster have the same duotone
        rule_counts[len(rules_of(elements))] += 1
        ink_shares += [element.content.ink_share for element in elements if isinstance(element.content, TextLines)]
    assert all(0.25 < mounts[mount] / mounts.total() < 0.42 for mount in MOUNTS)
    assert 0.4 < np.mean(own_colors) < 0.6
    assert 0.4 < 1 - rule_counts[0] / 400 < 0.6
    assert set(rule_counts) == {0, 1, 2, 3}
    assert 0.6 <= min(ink_shares) < 0.65 < 0.95 < max(ink_shares) <= 1


def test_rules_keep_clear_of_text_and_pictures_and_move_nothing() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        laid_out = lay_out(draw_brief(rng), rng, "standard")
        _, elements = finished(seed)
        rules = rules_of(elements)
        others = [element for element in elements if element not in rules]
        assert [(e.kind, e.role, e.box) for e in others] == [(e.kind, e.role, e.box) for e in laid_out]
        for x0, y0, x1, y1 in (rule.box for rule in rules):
            assert x1 - x0 >= 4
            assert 0.15 <= y1 - y0 <= 0.25
            for element in others:
                if element.kind != "shape":
                    left, top, right, bottom = element.box
                    assert x1 <= left or right <= x0 or y1 < top or bottom < y0


@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_rules_are_marked_as_ink_and_not_as_text(resolution: int) -> None:
    seen = 0
    for index in range(24):
        row = make_row(PosterOptions(0, resolution, "standard"), index)
        maps = {name: np.asarray(pixels(row, name)) for name in F_TENSOR_CHANNELS}
        for element in row["elements"]:
            if (element["kind"], element["role"]) != ("shape", "ink"):
                continue
            x0, y0, x1, y1 = (element[name] * resolution for name in ("x0", "y0", "x1", "y1"))
            inside = np.s_[round(y0) : max(int(y1), round(y0) + 1), round(x0) : round(x1)]
            assert (maps["color_role"][inside] == ROLE["ink"]).all()
            assert not maps["text_mask"][inside].any()
            assert (maps["hierarchy"][inside] == round(255 * element["hierarchy"])).all()
            assert 0 < element["hierarchy"] < 0.25
            seen += 1
    assert seen >= 8


@pytest.mark.parametrize("resolution", [64, 128, 256])
@pytest.mark.parametrize("mount", MOUNTS)
def test_maps_of_pictures_match_their_mounts(mount: str, resolution: int) -> None:
    element = Element("picture", "surface", 0.7, PICTURE_BOX, Scene("city", 1, mount))
    maps = draw_poster(finished(0)[0], [element], resolution, "standard", seed=0).maps
    x0, y0, x1, y1 = (round(value * resolution / UNITS) for value in PICTURE_BOX)
    line = round(KEYLINE * resolution / UNITS) if mount == "keyline" else 0
    roles = np.zeros((resolution, resolution), dtype=np.uint8)
    roles[y0:y1, x0:x1] = ROLE["ink"]
    roles[y0 + line : y1 - line, x0 + line : x1 - line] = ROLE["surface"]
    whole = np.zeros_like(roles)
    whole[y0:y1, x0:x1] = 1
    assert np.array_equal(np.asarray(maps.color_role), roles)
    assert np.array_equal(np.asarray(maps.image_mask), 255 * whole)
    assert np.array_equal(np.asarray(maps.hierarchy), round(0.7 * 255) * whole)


def test_bare_pictures_cast_no_shadow() -> None:
    brief = replace(finished(0)[0], background="cream", ink="black")
    darkest = {}
    for mount in MOUNTS:
        element = Element("picture", "surface", 0.7, PICTURE_BOX, Scene("city", 1, mount))
        image = np.asarray(draw_poster(brief, [element], 128, "standard", seed=0).image, dtype=float).mean(axis=2)
        below, above = image[104:106, 32:80].mean(), image[20:22, 32:80].mean()
        darkest[mount] = below / above
    assert max(darkest["keyline"], darkest["shadow"]) < 0.9 * darkest["bare"]


@pytest.mark.parametrize("complexity", ["standard", "rich"])
@pytest.mark.parametrize(("background", "ink"), [("teal", "black"), ("blue", "cream")])
def test_pictures_in_the_posters_own_colors_show_the_page(background: str, ink: str, complexity: str) -> None:
    """A part of the picture equals the background around it; with colours of its own, almost nothing does."""
    brief = replace(finished(0)[0], background=background, ink=ink, style="pop")
    duotone = ("ink", "background") if ink == "black" else ("background", "ink")
    shares = []
    for colors in (duotone, None):
        bare = Element("picture", "surface", 0.7, PICTURE_BOX, Scene("still_life", 1, "bare", colors))
        drawn, empty = (
            np.asarray(draw_poster(brief, elements, 256, complexity, seed=0).image.reduce(4), dtype=float)
            for elements in ([bare], [])
        )
        like_page = np.abs(drawn - empty).max(axis=2) < 12
        shares.append(like_page[12:52, 12:44].mean())
    assert shares[0] > 0.015
    assert shares[1] < shares[0] / 2


def test_duotones_contrast() -> None:
    own = 0
    for seed in range(200):
        brief, elements = finished(seed)
        for element in elements:
            if isinstance(element.content, Scene) and element.content.duotone:
                dark, light = (np.dot(brief.color_of(role), (0.299, 0.587, 0.114)) for role in element.content.duotone)
                assert light - dark >= 60
                assert "background" in element.content.duotone
                own += 1
    assert own > 50


@pytest.mark.parametrize("complexity", ["standard", "rich"])
def test_small_text_is_letters_from_128_pixels_on(complexity: str) -> None:
    block = Element("text", "ink", 0.25, (2, 4, 6, 8), TextLines((1.0, 1.0, 1.0, 0.5), "left"))
    for resolution, letters in ((64, False), (128, True), (256, True)):
        maps = draw_poster(finished(0)[0], [block], resolution, complexity, seed=0).maps
        ink, lines = np.asarray(maps.color_role) == ROLE["ink"], np.asarray(maps.text_mask) == 255
        assert (0.1 < ink[lines].mean() < 0.7) if letters else np.array_equal(ink, lines)


def test_small_text_is_ink_mixed_with_the_page() -> None:
    brief = replace(finished(0)[0], background="cream", ink="black")
    block = Element("text", "ink", 0.25, (2, 4, 6, 8), TextLines((1.0, 1.0), "left", ink_share=0.6))
    drawn = draw_poster(brief, [block], 64, "plain", seed=0)
    expected = 0.6 * np.array(COLORS["black"]) + 0.4 * np.array(COLORS["cream"])
    bars = np.asarray(drawn.image)[np.asarray(drawn.maps.text_mask) == 255]
    assert np.abs(bars - expected).max() <= 0.5


def test_grain_light_and_blur_are_those_of_a_scan() -> None:
    edge = np.full((128, 128, 3), 60, dtype=np.uint8)
    edge[:, 64:] = 180
    brightest, softness = [], []
    for seed in range(20):
        rng, scan = (np.random.default_rng([seed, stream]) for stream in range(2))
        image = np.asarray(printed_and_scanned(Image.fromarray(edge), rng, scan), dtype=float)
        assert (np.ptp(image, axis=2) <= 1).all()  # grey stays grey
        tones = image[..., 0]
        grain = (tones[:, 1:60] - tones[:, :59]).std() / np.sqrt(2)
        assert 4.5 < grain < 5.5
        light = tones[:, 72:].reshape(8, 16, 7, 8).mean(axis=(1, 3)) / 180
        assert 0.77 < light.min() < light.max() < 1.13
        brightest.append(np.ptp(light))
        softness.append((tones[:, 63].mean() - tones[:, 58:62].mean()) / (tones[:, 66:70] - tones[:, 58:62]).mean())
    assert np.mean(brightest) > 0.1  # the light is uneven
    assert min(softness) < 0.05 < 0.15 < max(softness) < 0.35  # from sharp to slightly soft
