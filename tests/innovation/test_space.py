"""The space of briefs: every point is a valid brief, fields are fixed, free or open, and bad spaces are refused."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.common.design_brief import FIELDS, READABLE_DISTANCE, DesignBrief
from pipelines.common.poster_domain import MAX_PICTURES, STYLES, color_distance, rgb_color
from pipelines.tools.cli import UserError
from training.innovation.space import BriefSpace, check_measures, reflected

EVERYTHING = BriefSpace(tuple(FIELDS), noises=4)


def points(count: int, space: BriefSpace, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, len(space.axes)))


def test_every_point_is_a_complete_brief_and_every_choice_occurs():
    briefs, noises = EVERYTHING.decode(points(500, EVERYTHING))
    assert all(set(brief.to_dict()) == set(FIELDS) for brief in briefs)
    assert {brief.style for brief in briefs} == set(STYLES)
    assert {brief.pictures for brief in briefs} == set(range(MAX_PICTURES + 1))
    assert {brief.text_blocks for brief in briefs} == {1, 2, 3}
    assert {len(brief.palette) for brief in briefs} == {3, 4}
    assert set(noises) == {0, 1, 2, 3}


def test_numbers_are_the_coordinates():
    space = BriefSpace(("balance", "density"))
    (brief,), (noise,) = space.decode(np.array([[0.25, 0.75]]))
    assert (brief.to_dict(), noise) == ({"balance": 0.25, "density": 0.75}, 0)


def test_colours_of_a_palette_differ_and_stand_out_from_its_background():
    briefs, _ = EVERYTHING.decode(points(500, EVERYTHING))
    for brief in briefs:
        ground, *others = [np.array(rgb_color(code)) for code in brief.palette]
        assert len(set(brief.palette)) == len(brief.palette)
        assert all(color_distance(ground, other) >= READABLE_DISTANCE for other in others)


def test_points_outside_of_the_cube_are_mirrored_at_its_faces():
    assert reflected(np.array([0.2, -0.2, 1.2, 2.2, -1.2])) == pytest.approx([0.2, 0.2, 0.8, 0.2, 0.8])
    inside = points(20, EVERYTHING)
    assert EVERYTHING.decode(-inside) == EVERYTHING.decode(inside)
    assert EVERYTHING.decode(2 - inside) == EVERYTHING.decode(inside)


def test_fixed_fields_are_in_every_brief_and_are_not_searched():
    space = BriefSpace(("style", "energy", "pictures"), DesignBrief(style="swiss", palette=["red", "cream"]))
    assert space.axes == ["energy", "pictures"]
    briefs, _ = space.decode(points(9, space))
    assert {brief.style for brief in briefs} == {"swiss"}
    assert {brief.palette for brief in briefs} == {("#d0202a", "#f6ecd6")}
    assert {brief.balance for brief in briefs} == {None}


@pytest.mark.parametrize(
    ("free", "fixed", "message"),
    [
        ((), DesignBrief(), "no free field: --fields is none"),
        (("style",), DesignBrief(style="pop"), r"no free field: --fields is style, and --brief gives all of them"),
        (("blance",), DesignBrief(), "no field 'blance'; did you mean 'balance'"),
    ],
)
def test_a_space_without_a_free_field_or_with_an_unknown_one_is_refused(free, fixed, message):
    with pytest.raises(UserError, match=message):
        BriefSpace(free, fixed)


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        (["balance", "densty"], "'densty' is unknown; did you mean 'density'"),
        (["balance"], "two to four different names"),
        (["balance", "balance"], "two to four different names"),
        (["balance", "density", "rhythm", "symmetry", "energy"], "two to four different names"),
        (["balance", "warmth"], "warmth is the value in the brief, which is the same for all posters"),
    ],
)
def test_unsuitable_measures_are_refused(measures, message):
    with pytest.raises(UserError, match=message):
        check_measures(measures, BriefSpace(("balance", "energy")))


def test_style_axes_that_are_free_are_measures():
    check_measures(["energy", "density"], BriefSpace(("energy",)))
