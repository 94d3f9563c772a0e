"""Tests of rich posters: text rotated with its masks, realistic photographs, JPEG noise, and an unchanged design."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_scripts.posters.brief import draw_brief
from data_scripts.posters.elements import UNITS, Element, Scene, TextLines, Title
from data_scripts.posters.layout import EDGE, TITLE_BAND, lay_out, turn_text
from data_scripts.posters.painting.drawing import DrawnPoster, draw_poster
from data_scripts.posters.painting.pictures import SUBJECTS
from data_scripts.posters.painting.textures import with_jpeg_noise
from data_scripts.posters.photographs.gallery import SHOTS, take_photograph
from data_scripts.posters.records import PosterOptions, Row, make_row
from pipelines.common.poster_domain import COLOR_ROLES, COLORS, GRAMMAR

INK = COLOR_ROLES.index("ink")
SIZE = (104, 72)


def image_array(row: Row, name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row[name]["bytes"])))


@pytest.fixture(scope="module")
def rich_and_standard() -> list[tuple[Row, Row]]:
    made = ((PosterOptions(4, 64, complexity) for complexity in ("rich", "standard")) for _ in range(50))
    return [tuple(make_row(options, index) for options in pair) for index, pair in enumerate(made)]


def test_only_text_differs_from_the_standard_poster(rich_and_standard: list[tuple[Row, Row]]) -> None:
    image_columns = {"image", "text_mask", "image_mask", "color_role", "hierarchy"}
    turned_titles = 0
    for rich, standard in rich_and_standard:
        for name in set(rich) - image_columns - {"elements", *GRAMMAR}:
            assert rich[name] == standard[name], name
        assert len(rich["elements"]) == len(standard["elements"])
        for there, here in zip(standard["elements"], rich["elements"], strict=True):
            if here["kind"] in ("shape", "picture"):
                assert here == there
            turned_titles += here["kind"] == "title" and here != there
    assert 15 <= turned_titles <= 45


def test_turned_titles_stay_where_the_brief_puts_them_and_on_the_page() -> None:
    tilts = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        brief = draw_brief(rng)
        for element in turn_text(lay_out(brief, rng, "rich"), rng):
            if not element.angle:
                continue
            tilts.add(element.angle)
            left, top, right, bottom = element.bounds
            assert min(left, top) >= EDGE - 1e-9
            assert max(right, bottom) <= UNITS - EDGE + 1e-9
            if element.kind == "title":
                low, high = TITLE_BAND[brief.title_position]
                assert low + 1 <= element.center[1] <= high - 1
    assert {-12.0, 12.0, 6.0, 90.0} <= tilts
    assert min(abs(tilt) for tilt in tilts) >= 5  # large enough to be seen


@pytest.mark.parametrize("angle", [-12.0, 9.0, 90.0])
def test_bounds_of_a_turned_box(angle: float) -> None:
    element = Element("text", "ink", 0.25, (2, 3, 6, 5), TextLines((1.0, 1.0), "left"), angle=angle)
    sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    width, height = 4 * cosine + 2 * sine, 4 * sine + 2 * cosine
    assert element.bounds == pytest.approx((4 - width / 2, 4 - height / 2, 4 + width / 2, 4 + height / 2))


def drawn(element: Element, resolution: int, **changes: object) -> DrawnPoster:
    brief = replace(draw_brief(np.random.default_rng(0)), style="pop", background="cream", ink="black", **changes)
    return draw_poster(brief, [element], resolution, "plain", seed=1)


def inside_turned(box: tuple[float, ...], element: Element, resolution: int, slack: float) -> np.ndarray:
    """Return which pixels' centres are in `box` rotated with `element`; `slack` (px) widens the box."""
    middles = (np.arange(resolution) + 0.5) * UNITS / resolution
    x, y = np.meshgrid(middles - element.center[0], middles - element.center[1])
    sine, cosine = math.sin(math.radians(element.angle)), math.cos(math.radians(element.angle))
    upright_x, upright_y = x * cosine - y * sine + element.center[0], x * sine + y * cosine + element.center[1]
    slack *= UNITS / resolution
    x0, y0, x1, y1 = box
    across, down = np.abs(2 * upright_x - x0 - x1), np.abs(2 * upright_y - y0 - y1)
    return (across <= x1 - x0 + 2 * slack) & (down <= y1 - y0 + 2 * slack)


@pytest.mark.parametrize("resolution", [64, 128, 256])
@pytest.mark.parametrize("angle", [-12.0, 7.0])
def test_a_turned_title_turns_its_masks_and_roles(resolution: int, angle: float) -> None:
    box = (3.0, 6.5, 13.0, 9.5)
    element = Element("title", "ink", 1.0, box, Title("ZOOM", "DejaVuSans-Bold", inverted=False), angle=angle)
    poster = drawn(element, resolution)
    maps, image = poster.maps, np.asarray(poster.image)
    for name in ("text_mask", "hierarchy"):
        mask = np.asarray(getattr(maps, name))
        assert set(np.unique(mask)) == {0, 255}
        assert (mask[inside_turned(box, element, resolution, slack=-0.5)] == 255).all()
        assert (mask[~inside_turned(box, element, resolution, slack=0.75)] == 0).all()
    letters = np.asarray(maps.color_role) == INK
    assert not letters[~inside_turned(box, element, resolution, slack=0.75)].any()
    ink, ground = ((image == COLORS[name]).all(axis=-1) for name in ("black", "cream"))
    assert letters[ink].all()
    assert not letters[ground].any()
    assert ink.sum() > 0.2 * letters.sum()  # the rest are edges


@pytest.mark.parametrize("resolution", [64, 256])
def test_turned_small_text_is_where_its_lines_are(resolution: int) -> None:
    lines = TextLines((1.0, 1.0, 1.0, 0.5), "left")
    for angle in (-12.0, 90.0):
        element = Element("text", "ink", 0.25, (5, 5, 9, 9), lines, angle=angle)
        poster = drawn(element, resolution)
        mask, role = np.asarray(poster.maps.text_mask) == 255, np.asarray(poster.maps.color_role) == INK
        assert (np.asarray(poster.maps.hierarchy)[mask] == round(0.25 * 255)).all()
        dark = np.asarray(poster.image).max(axis=2) < 80
        assert (mask & dark).sum() > 0.8 * dark.sum()  # the rest are descenders and edges
        assert (role & dark).sum() > 0.9 * dark.sum()
        block = inside_turned(element.box, element, resolution, slack=1)
        assert not (mask & ~block).any()


def test_a_turned_band_runs_from_edge_to_edge_over_everything() -> None:
    box = (2.0, 6.75, 14.0, 9.25)
    element = Element("title", "ink", 1.0, box, Title("IRON", "DejaVuSansMono-Bold", inverted=True), angle=9.0)
    brief = replace(draw_brief(np.random.default_rng(0)), style="brutalist")
    below = Element("picture", "surface", 0.7, (0, 0, 16, 16), Scene("city", 0))
    maps = draw_poster(brief, [below, element], 128, "rich", seed=0).maps
    role, image_mask = np.asarray(maps.color_role), np.asarray(maps.image_mask)
    band = inside_turned((-16, 6.25, 32, 9.75), element, 128, slack=-0.5)
    assert set(np.unique(role[band])) == {INK, COLOR_ROLES.index("background")}
    assert not image_mask[band].any()
    assert image_mask[~inside_turned((-16, 6.25, 32, 9.75), element, 128, slack=0.75)].all()
    assert band[:, 0].any()
    assert band[:, -1].any()


def test_a_picture_shows_between_the_letters_of_a_title_over_it() -> None:
    element = Element("title", "ink", 1.0, (2, 6, 14, 9), Title("ZOOM", "DejaVuSans-Bold", inverted=False), angle=-9.0)
    below = Element("picture", "surface", 0.7, (4, 2, 12, 14), Scene("portrait", 0))
    maps = draw_poster(draw_brief(np.random.default_rng(0)), [below, element], 128, "rich", seed=0).maps
    assert (np.asarray(maps.image_mask)[16:112, 32:96] == 255).all()
    both = (np.asarray(maps.text_mask) == 255) & (np.asarray(maps.image_mask) == 255)
    assert both.any()
    assert (np.asarray(maps.hierarchy)[both] == 255).all()


def test_every_subject_is_photographed() -> None:
    assert set(SHOTS) == set(SUBJECTS)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_photograph_is_a_function_of_its_seed(subject: str) -> None:
    first, again, other = (take_photograph(subject, SIZE, 16, seed) for seed in (3, 3, 4))
    assert first.mode == "RGB"
    assert first.size == SIZE
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_photograph_is_the_same_at_every_resolution(subject: str) -> None:
    large, small = (np.asarray(take_photograph(subject, (88 // k, 72 // k), 16 / k, 5), dtype=float) for k in (1, 4))
    averaged = large.reshape(18, 4, 22, 4, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small).max() <= 1


def spectral_slope(tones: np.ndarray) -> float:
    """Return minus the exponent of the windowed radial power spectrum between 3 and 24 cycles per image."""
    tones = (tones - tones.mean()) * np.hanning(tones.shape[0])[:, None] * np.hanning(tones.shape[1])
    power = np.abs(np.fft.fftshift(np.fft.fft2(tones))) ** 2
    rows, columns = (np.arange(side) - side // 2 for side in power.shape)
    radius = np.hypot(*np.meshgrid(rows, columns, indexing="ij"))
    rings = np.arange(3, 25)
    means = [power[(radius >= ring - 0.5) & (radius < ring + 0.5)].mean() for ring in rings]
    return -float(np.polyfit(np.log(rings), np.log(means), 1)[0])


@pytest.mark.parametrize("subject", SUBJECTS)
def test_photographs_have_the_statistics_of_photographs(subject: str) -> None:
    """Power falls roughly as frequency^-2 (1.2 to 3.5 in collections); many tones, noise, a full tonal range."""
    taken = [np.asarray(take_photograph(subject, (96, 96), 16, seed), dtype=float) for seed in range(8)]
    slopes = [spectral_slope(image.mean(axis=2)) for image in taken]
    assert 1.2 < np.mean(slopes) < 3.7
    for image in taken:
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 2000
        low, high = np.quantile(image, (0.02, 0.98))
        assert high - low > 70
        finest = image[1:-1] - (image[:-2] + image[2:]) / 2  # the part that the neighbours do not predict
        assert np.median(np.abs(finest)) > 1
    assert len({tuple(image.mean(axis=(0, 1)).round()) for image in taken}) == 8


def test_jpeg_noise_has_random_quality() -> None:
    poster = draw_poster(draw_brief(np.random.default_rng(0)), [], 64, "standard", seed=0).image
    rng = np.random.default_rng(0)
    noisy = [with_jpeg_noise(poster, rng) for _ in range(12)]
    assert with_jpeg_noise(poster, np.random.default_rng(0)).tobytes() == noisy[0].tobytes()
    errors = [np.abs(np.asarray(image, dtype=float) - np.asarray(poster)).mean() for image in noisy]
    assert all(0 < error < 6 for error in errors)
    assert max(errors) > 1.25 * min(errors)  # qualities differ
    assert noisy[0].mode == "RGB"


def test_one_index_is_one_rich_design_at_every_resolution() -> None:
    for index in range(6):
        small, large = (make_row(PosterOptions(0, pixels, "rich"), index) for pixels in (64, 256))
        for name in ("text", "elements", *GRAMMAR):
            assert small[name] == large[name]
        averaged = image_array(large, "image").reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        # The differences are small text (letters at 256 px, bars at 64 px), grain, and a blur that is given in pixels.
        assert np.abs(averaged - image_array(small, "image")).mean() < 17
