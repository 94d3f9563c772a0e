"""Tests of the design grammar (V_Grammar): values computed by hand, and properties of every layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scripts.posters.grammar import cut_into_quadrants, design_grammar, image_share
from pipelines.common.poster_domain import ELEMENT_KINDS, GRAMMAR

MIRRORED = tuple(name for name in GRAMMAR if name != "regularity")
"""Measures that mirroring does not change. Regularity changes, because it counts only left and upper edges."""


def element(kind: str, hierarchy: float, *box: float) -> dict:
    return {"kind": kind, "hierarchy": hierarchy, **dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))}


def assert_grammar(elements: list[dict], **expected: float) -> None:
    values = design_grammar(elements)
    assert tuple(values) == GRAMMAR
    assert values == {name: pytest.approx(expected[name], abs=1e-12) for name in GRAMMAR}


def test_empty_page() -> None:
    nothing = {"density": 0.0, "hierarchy_contrast": 0.0, "image_share": 0.0}
    perfect = {"balance": 1.0, "equilibrium": 1.0, "symmetry": 1.0, "regularity": 1.0, "rhythm": 1.0}
    assert_grammar([], **perfect, **nothing)
    outside, line, backwards = ((1.2, 0, 2, 1), (0.5, 0, 0.5, 1), (0.8, 0.2, 0.3, 0.9))
    assert_grammar([element("picture", 0.7, *box) for box in (outside, line, backwards)], **perfect, **nothing)


def test_one_centred_box() -> None:
    # Cut at both axes, the box gives four equal parts. Its area is 1/4: density 1 - 2 |1/2 - 1/4| = 1/2.
    assert_grammar(
        [element("picture", 0.75, 0.25, 0.25, 0.75, 0.75)],
        balance=1.0,
        equilibrium=1.0,
        symmetry=1.0,
        regularity=1.0,
        rhythm=1.0,
        density=0.5,
        hierarchy_contrast=0.0,
        image_share=0.25,
    )


def test_two_equal_halves() -> None:
    # Starts: columns at 0 and 1/2, one row at 0; one distance, 1/2. Alignment 1 - 3/4, spacing 1: (1/4 + 1) / 2 = 5/8.
    # The page is full: density 1 - 2 |1/2 - 1| = 0. Hierarchies 0.65 and 0.25: mean 0.45, deviation 0.2, twice that.
    assert_grammar(
        [element("picture", 0.65, 0, 0, 0.5, 1), element("text", 0.25, 0.5, 0, 1, 1)],
        balance=1.0,
        equilibrium=1.0,
        symmetry=1.0,
        regularity=5 / 8,
        rhythm=1.0,
        density=0.0,
        hierarchy_contrast=0.4,
        image_share=0.5,
    )


def test_diagonal() -> None:
    # All quadrant sums are (1, 0, 0, 1) after division by the largest. Mirrored in an axis each quadrant meets an empty
    # one: SYM_vertical = SYM_horizontal = 6 · 2 / 12 = 1; mirrored in the centre, each meets its equal: SYM_radial = 0.
    # SYM = 1 - 2/3. Four of the six pairs differ by 1: RHM = 1 - 4/6.
    # Two columns, two rows: alignment 1 - 4/4 = 0; one distance (3/4): spacing 1. Area 2/16: 1 - 2 · 3/8.
    assert_grammar(
        [element("shape", 0.5, 0, 0, 0.25, 0.25), element("shape", 0.5, 0.75, 0.75, 1, 1)],
        balance=1.0,
        equilibrium=1.0,
        symmetry=1 / 3,
        regularity=0.5,
        rhythm=1 / 3,
        density=0.25,
        hierarchy_contrast=0.0,
        image_share=0.0,
    )


def test_asymmetric_with_a_box_across_the_axis() -> None:
    # Title T = (1/4, 0, 3/4, 1/4): area 1/8, centre (1/2, 1/8). Picture P, the lower right quadrant: area 1/4, centre
    # (3/4, 3/4).
    #
    # Balance. Left: half of T, 1/16 · 1/8 = 1/128. Right: the same and P, 1/128 + 1/4 · 1/4 = 9/128. Top: T, 1/8 · 3/8
    # = 3/64. Bottom: P, 1/16 = 4/64. BM = 1 - (8/9 + 1/4) / 2 = 31/72.
    #
    # Equilibrium. n sum a = 2 · 3/8 = 3/4. EM_x = 2 (0 + 1/4 · 1/4) / (3/4) = 1/6; EM_y = 2 (-3/64 + 4/64) / (3/4)
    # = 1/24. EM = 1 - (5/24) / 2 = 43/48.
    #
    # Symmetry. Upper left and right hold half of T each: centre 1/8 and 3/8 from the axes, height 1/4, breadth 1/4,
    # Theta 3, R sqrt(10)/8, all times the share 1/2. Lower right holds P: 1/4, 1/4, 1/2, 1/2, 1, sqrt(2)/4. Over the
    # largest: X (1/4, 1/4, 0, 1), Y (3/4, 3/4, 0, 1), H and B (1/4, 1/4, 0, 1), Theta (1, 1, 0, 2/3) and
    # R (r, r, 0, 1) with r = sqrt(5)/4.
    #   vertical: UL = UR; LR against the empty LL: 5 + 2/3 = 17/3, over 12: 17/36.
    #   horizontal: UL against LL: 1/4 + 3/4 + 1/4 + 1/4 + 1 + r = 5/2 + r; UR against LR: 3/4 + 1/4 + 3/4 + 3/4 + 1/3
    #   + (1 - r) = 23/6 - r; together 19/3, over 12: 19/36.
    #   radial: UL against LR is UR against LR above, UR against LL is UL against LL: 19/36.
    # SYM = 1 - (17 + 19 + 19) / 108 = 53/108.
    #
    # Regularity. Columns 1/4, 1/2; rows 0, 1/2: alignment 0; distances 1/4, 1/2: spacing 1 - 1/2. RM = 1/4.
    # Rhythm. X (1/4, 1/4, 0, 1): 0 + 1/4 + 3/4 + 1/4 + 3/4 + 1 = 3, over 6: 1/2; Y (3/4, 3/4, 0, 1): 3 as well; areas
    # 1/16, 1/16, 0, 1/4: as X. RHM = 1 - 1/2.
    # Density 1 - 2 |1/2 - 3/8| = 3/4. Hierarchies 1 and 3/4: deviation 1/8.
    assert_grammar(
        [element("title", 1.0, 0.25, 0, 0.75, 0.25), element("picture", 0.75, 0.5, 0.5, 1, 1)],
        balance=31 / 72,
        equilibrium=43 / 48,
        symmetry=53 / 108,
        regularity=0.25,
        rhythm=0.5,
        density=0.75,
        hierarchy_contrast=0.25,
        image_share=0.25,
    )


def test_regularity_counts_lines_and_distances() -> None:
    # A grid of 3 × 2 at equal distances: 3 columns, 2 rows, n = 6; distances 0.3, 0.3 and 0.3.
    grid = [element("shape", 0.5, x, y, x + 0.2, y + 0.2) for x in (0.1, 0.4, 0.7) for y in (0.1, 0.4)]
    assert design_grammar(grid)["regularity"] == pytest.approx((1 - 5 / 12 + 1) / 2)
    # Nothing shared: 3 columns, 3 rows, four distances 0.1, 0.5, 0.2, 0.3: (0 + 1 - 3/4) / 2.
    loose = [element("shape", 0.5, x, y, x + 0.1, y + 0.1) for x, y in ((0.1, 0.0), (0.2, 0.2), (0.7, 0.5))]
    assert design_grammar(loose)["regularity"] == pytest.approx(1 / 8)
    # On top of each other: 1 column, 1 row, no distance.
    stack = [element("shape", 0.5, 0.1, 0.1, 0.3, side) for side in (0.4, 0.5)]
    assert design_grammar(stack)["regularity"] == pytest.approx((1 - 2 / 4 + 1) / 2)


def test_overlapping_pictures_are_counted_once() -> None:
    # 0.5 × 0.5 and 0.5 × 0.5, sharing 0.25 × 0.25; a third, wholly inside.
    boxes = np.array([(0.1, 0.1, 0.6, 0.6), (0.35, 0.35, 0.85, 0.85), (0.2, 0.2, 0.3, 0.3)])
    assert image_share(boxes) == pytest.approx(0.25 + 0.25 - 0.0625)


def test_overfull_page_has_density_zero() -> None:
    assert design_grammar([element("shape", 0.5, 0, 0, 1, 1)] * 3)["density"] == 0.0


def test_elements_are_clipped_to_the_page() -> None:
    over, within = element("shape", 0.5, -3, 0.5, 0.25, 7), element("shape", 0.5, 0, 0.5, 0.25, 1)
    assert design_grammar([over]) == design_grammar([within])


def test_a_sliver_across_the_axis_has_almost_no_effect() -> None:
    still = [element("title", 1.0, 0.1, 0.1, 0.5, 0.3), element("picture", 0.7, 0.2, 0.6, 0.9, 0.9)]
    nudged = [{**still[0], "x1": 0.5 + 1e-5}, still[1]]
    before, after = design_grammar(still), design_grammar(nudged)
    for name in ("balance", "equilibrium", "rhythm", "density"):
        assert after[name] == pytest.approx(before[name], abs=1e-3)


def test_parts_keep_area_and_shares() -> None:
    boxes = np.array([(0.1, 0.2, 0.9, 0.7), (0.6, 0.1, 0.8, 0.3), (0.5, 0.5, 1.0, 1.0)])
    quadrants, parts, shares = cut_into_quadrants(boxes)
    assert quadrants.tolist() == [0, 1, 1, 2, 3, 3]
    areas = (parts[:, 2] - parts[:, 0]) * (parts[:, 3] - parts[:, 1])
    assert areas.sum() == pytest.approx(0.8 * 0.5 + 0.2 * 0.2 + 0.25)
    assert shares.sum() == pytest.approx(3)
    assert shares[0] == pytest.approx(0.4 * 0.3 / 0.4)


def layouts(coordinates: st.SearchStrategy[float]) -> st.SearchStrategy[list[dict]]:
    return st.lists(
        st.builds(element, st.sampled_from(ELEMENT_KINDS), st.floats(0, 1), *[coordinates] * 4),
        max_size=8,
    )


any_coordinates = st.floats(-0.5, 1.5, width=32) | st.sampled_from((0.0, 0.25, 0.5, 0.5 + 1e-7, 0.75, 1.0))
exact_coordinates = st.integers(-128, 384).map(lambda number: number / 256)
"""Coordinates that are mirrored without rounding, so that a box is empty either on both sides or on neither."""


@settings(max_examples=300, deadline=None)
@given(layouts(any_coordinates))
def test_all_eight_are_between_0_and_1_for_any_boxes(elements: list[dict]) -> None:
    values = design_grammar(elements)
    assert tuple(values) == GRAMMAR
    for name, value in values.items():
        assert math.isfinite(value), name
        assert 0.0 <= value <= 1.0, name


@settings(max_examples=200, deadline=None)
@given(layouts(exact_coordinates))
def test_mirrors_change_only_regularity_and_order_changes_nothing(elements: list[dict]) -> None:
    values = design_grammar(elements)
    flipped = [{**e, "x0": 1 - e["x1"], "x1": 1 - e["x0"]} for e in elements]
    upside_down = [{**e, "y0": 1 - e["y1"], "y1": 1 - e["y0"]} for e in elements]
    for mirrored in (flipped, upside_down):
        there = design_grammar(mirrored)
        assert {name: there[name] for name in MIRRORED} == {name: pytest.approx(values[name]) for name in MIRRORED}
    assert design_grammar(elements[::-1]) == pytest.approx(values)
