"""The quality of posters with known readings, against values by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.common.design_brief import DesignBrief
from pipelines.common.poster_domain import COLORS, GRAMMAR
from training.innovation.quality import Reading, layout_quality, obedience, quality

GRAMMAR_READ = dict.fromkeys(GRAMMAR, 0.5)


def reading(color: str = "red", **grammar: float) -> Reading:
    pixels = np.full((8, 8, 3), COLORS[color], dtype=np.uint8)
    outside = np.ones((8, 8), bool)
    return Reading({**GRAMMAR_READ, **grammar}, {"text_blocks": 1, "pictures": 2}, pixels, outside)


def test_a_poster_that_is_as_asked_obeys():
    brief = DesignBrief(palette=["red"], pictures=2, text_blocks=1, **GRAMMAR_READ)
    assert obedience(brief, reading()) == 1
    assert obedience(DesignBrief(style="pop", energy=0.9), reading()) == 1  # nothing that can be read


def test_obedience_is_the_mean_over_the_fields_that_are_given():
    brief = DesignBrief(balance=0.1, pictures=3, palette=["red"])
    # 1 - 0.4, 1 - 1 / 3, and a palette that is there
    assert obedience(brief, reading()) == pytest.approx((0.6 + 2 / 3 + 1) / 3)


def test_other_colours_than_asked_cost_the_whole_palette():
    assert obedience(DesignBrief(palette=["blue"]), reading("red")) == 0
    # Half of the palette is missing: the distance is that of the missing colour, divided by 2 (colours) and 2 (ways).
    distance = np.linalg.norm(np.subtract(COLORS["orange"], COLORS["red"])) / 4
    assert obedience(DesignBrief(palette=["red", "orange"]), reading("red")) == pytest.approx(1 - distance / 80)


def test_pixels_inside_pictures_do_not_count_against_the_palette():
    poster = reading("red")
    poster.pixels[:4], poster.outside[:4] = COLORS["blue"], False
    assert obedience(DesignBrief(palette=["red"]), poster) == 1


def test_numbers_that_span_the_archive_do_not_count_as_good_or_bad():
    grammar = {**GRAMMAR_READ, "balance": 0.0, "equilibrium": 1.0}
    assert layout_quality(grammar, ["density", "image_share"]) == pytest.approx((0 + 1 + 3 * 0.5) / 5)
    assert layout_quality(grammar, ["balance", "density"]) == pytest.approx((1 + 3 * 0.5) / 4)
    assert layout_quality(grammar, ["balance", "equilibrium"]) == pytest.approx(0.5)


def test_quality_needs_both_parts_and_no_copy():
    assert quality(0.9, 0.4, is_copy=False) == pytest.approx(0.6)
    assert quality(1.0, 0.0, is_copy=False) == 0
    assert quality(1.0, 1.0, is_copy=True) == 0
