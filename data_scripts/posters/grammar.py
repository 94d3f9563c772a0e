"""V_Grammar: what can be said of a layout in eight numbers, each in [0, 1], from the boxes of its elements alone.

Six are those of Ngo, Teo and Byrne, "Modelling interface aesthetics", Information Sciences 152 (2003), as printed
there; hierarchy contrast and image share are ours. The page is the unit square, x to the right, y downwards, its centre
(x_c, y_c) = (1/2, 1/2), so that b_frame = h_frame = a_frame = 1.

What the paper leaves open is settled as follows:
- Every element of any kind counts, clipped to the page; n counts those that are left. What is thinner than THINNEST is
  empty.
- A box that lies across an axis of the page is cut there, and its parts count where they lie. Where the paper counts
  elements, not areas (symmetry and rhythm), a part counts by its share of the element's area: an element counts once
  in all, and a sliver over the axis next to nothing.
- "Normalised" sums of the four quadrants are divided by the largest of them, as in balance.
- 0/0 is 0: sides and quadrants that are all empty do not differ. So an empty page is in perfect balance, equilibrium,
  symmetry, regularity and rhythm; its density, hierarchy contrast and image share are 0.

Legend: n boxes (x0, y0, x1, y1), P parts of boxes, 4 quadrants: upper left, upper right, lower left, lower right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from pipelines.common.poster_domain import GRAMMAR

THINNEST = 1e-6
"""Share of the page's side."""
SAME_LINE = 1 / 512
"""Edges and distances that differ by no more are the same: half a pixel at 256 px, which no eye tells apart."""

CENTER = 0.5
VERTICAL_PAIRS = ((0, 1), (2, 3))
"""Quadrants that mirror each other in the vertical axis: upper left and right, lower left and right."""
HORIZONTAL_PAIRS = ((0, 2), (1, 3))
RADIAL_PAIRS = ((0, 3), (1, 2))


def design_grammar(elements: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """V_Grammar of a poster.

    Args:
        elements: rows of the dataset's `elements` column, or mappings with the same `kind`, `hierarchy`, `x0`, `y0`,
            `x1` and `y1` (the page is the unit square).

    Returns:
        {name: value in [0, 1]} for each name of `pipelines.common.poster_domain.GRAMMAR`, in that order.
    """
    seen = [(element, box) for element in elements if (box := _on_page(element)) is not None]
    boxes = np.array([box for _, box in seen], dtype=np.float64).reshape(-1, 4)
    pictures = np.array([element["kind"] == "picture" for element, _ in seen], dtype=bool)
    values = {
        "balance": balance(boxes),
        "equilibrium": equilibrium(boxes),
        "symmetry": symmetry(boxes),
        "regularity": regularity(boxes),
        "rhythm": rhythm(boxes),
        "density": density(boxes),
        "hierarchy_contrast": hierarchy_contrast([element["hierarchy"] for element, _ in seen]),
        "image_share": image_share(boxes[pictures]),
    }
    return {name: min(max(values[name], 0.0), 1.0) for name in GRAMMAR}  # only rounding is cut off here


def balance(boxes: np.ndarray) -> float:
    """Whether the sides weigh the same:

    BM = 1 - (|BM_vertical| + |BM_horizontal|) / 2,
    BM_vertical = (w_L - w_R) / max(w_L, w_R), BM_horizontal = (w_T - w_B) / max(w_T, w_B), w_j = sum_i a_ij d_ij,
    a_ij being the area of element i on side j, d_ij the distance between the central lines of (that part of) the
    element and of the page.

    Args:
        boxes: n × 4, on the page.
    """
    imbalance = 0.0
    for low, high, across in ((0, 2, boxes[:, 3] - boxes[:, 1]), (1, 3, boxes[:, 2] - boxes[:, 0])):
        before = np.clip(CENTER - boxes[:, (low, high)], 0, None)  # distances of the near and far edge: n × 2
        after = np.clip(boxes[:, (low, high)] - CENTER, 0, None)
        # Area times distance of a part from a to b is (b - a)(b + a)/2 times its extent across.
        weight_before = float((across * (before[:, 0] ** 2 - before[:, 1] ** 2)).sum()) / 2
        weight_after = float((across * (after[:, 1] ** 2 - after[:, 0] ** 2)).sum()) / 2
        imbalance += abs(_ratio(weight_before - weight_after, max(weight_before, weight_after)))
    return 1 - imbalance / 2


def equilibrium(boxes: np.ndarray) -> float:
    """How near the centre of mass is to the page's centre:

    EM = 1 - (|EM_x| + |EM_y|) / 2,
    EM_x = 2 sum_i a_i (x_i - x_c) / (n b_frame sum_i a_i), and EM_y alike with y and h_frame. (The n in
    the denominator is the paper's: of many elements, even a crooked layout is not far from equilibrium.)

    Args:
        boxes: n × 4, on the page.
    """
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas = widths * heights
    total = len(boxes) * float(areas.sum())
    offset = 0.0
    for low, high in ((0, 2), (1, 3)):
        centers = (boxes[:, low] + boxes[:, high]) / 2
        offset += abs(_ratio(2 * float((areas * (centers - CENTER)).sum()), total))
    return 1 - offset / 2


def symmetry(boxes: np.ndarray) -> float:
    """How far the quadrants mirror each other in the vertical axis, the horizontal axis and the centre:

    SYM = 1 - (SYM_vertical + SYM_horizontal + SYM_radial) / 3,
    SYM_vertical = sum over V in (X, Y, H, B, Theta, R) of (|V'_UL - V'_UR| + |V'_LL - V'_LR|) / 12; for SYM_horizontal
    the pairs are UL and LL, UR and LR, for SYM_radial UL and LR, UR and LL. The sums over the elements of quadrant j:
    X_j = |x_ij - x_c|, Y_j = |y_ij - y_c|, H_j = height, B_j = breadth, Theta_j = |y_ij - y_c| / |x_ij - x_c|,
    R_j = distance between the centres; V' is V over the largest V of the four.

    Args:
        boxes: n × 4, on the page.
    """
    quadrants, parts, shares = cut_into_quadrants(boxes)
    x = np.abs((parts[:, 0] + parts[:, 2]) / 2 - CENTER)
    y = np.abs((parts[:, 1] + parts[:, 3]) / 2 - CENTER)
    breadths, heights = parts[:, 2] - parts[:, 0], parts[:, 3] - parts[:, 1]
    measured = (x, y, heights, breadths, y / x, np.hypot(x, y))  # a part has an extent, so its x is not 0
    sums = np.array([_quadrant_sums(quadrants, shares * values) for values in measured])
    unlike = 0.0
    for pairs in (VERTICAL_PAIRS, HORIZONTAL_PAIRS, RADIAL_PAIRS):
        unlike += sum(float(np.abs(sums[:, a] - sums[:, b]).sum()) for a, b in pairs) / 12
    return 1 - unlike / 3


def regularity(boxes: np.ndarray) -> float:
    """How few lines and distances the layout gets by with:

    RM = (RM_alignment + RM_spacing) / 2, both 1 for a single element, else
    RM_alignment = 1 - (n_vap + n_hap) / (2n), RM_spacing = 1 - (n_spacing - 1) / (2 (n - 1)),
    n_vap and n_hap being the numbers of different left and upper edges (where columns and rows start), n_spacing the
    number of different distances from one start to the next. All elements starting at one point leave no distance;
    their spacing counts as 1.

    Args:
        boxes: n × 4, on the page.
    """
    n = len(boxes)
    if n <= 1:
        return 1.0
    columns, rows = _distinct(boxes[:, 0]), _distinct(boxes[:, 1])
    spacings = len(_distinct(np.concatenate([np.diff(columns), np.diff(rows)])))
    alignment = 1 - (len(columns) + len(rows)) / (2 * n)
    return (alignment + 1 - max(spacings - 1, 0) / (2 * (n - 1))) / 2


def rhythm(boxes: np.ndarray) -> float:
    """How evenly the elements are spread over the quadrants:

    RHM = 1 - (RHM_x + RHM_y + RHM_area) / 3, RHM_x = sum over the six pairs of quadrants of |X'_j - X'_k| / 6, X_j the
    sum of |x_ij - x_c| over the elements of quadrant j; alike with y and with areas. Not below 1/3: of four numbers
    with a largest of 1, at most four of the six pairs can differ by 1.

    Args:
        boxes: n × 4, on the page.
    """
    quadrants, parts, shares = cut_into_quadrants(boxes)
    x = np.abs((parts[:, 0] + parts[:, 2]) / 2 - CENTER)
    y = np.abs((parts[:, 1] + parts[:, 3]) / 2 - CENTER)
    areas = (parts[:, 2] - parts[:, 0]) * (parts[:, 3] - parts[:, 1])
    uneven = 0.0
    for values in (shares * x, shares * y, areas):
        sums = _quadrant_sums(quadrants, values)
        uneven += sum(abs(float(sums[a] - sums[b])) for a, b in combinations(range(4), 2)) / 6
    return 1 - uneven / 3


def density(boxes: np.ndarray) -> float:
    """How near the elements come to filling half of the page: DM = 1 - 2 |1/2 - sum_i a_i / a_frame|.

    Elements that overlap can fill more than the page; that is the density of a full page, 0.

    Args:
        boxes: n × 4, on the page.
    """
    filled = float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum())
    return 1 - 2 * abs(0.5 - min(filled, 1.0))


def hierarchy_contrast(hierarchies: Iterable[float]) -> float:
    """How far apart the elements are in hierarchy: the RMS contrast, 2 sqrt(mean_i (h_i - mean h)²).

    Twice the standard deviation, so that half of the elements at 0 and half at 1 give 1. Elements count alike, whatever
    their area: a line of small print tells as much of the order of things as the picture beside it. 0 for fewer than
    two elements.

    Args:
        hierarchies: one number per element, clipped to [0, 1].
    """
    values = np.clip(np.array(list(hierarchies), dtype=np.float64), 0, 1)
    return 2 * float(values.std()) if len(values) > 1 else 0.0


def image_share(boxes: np.ndarray) -> float:
    """Share of the page that pictures cover; where they overlap it counts once.

    Args:
        boxes: n × 4, the pictures' boxes on the page.
    """
    xs, ys = (np.unique(boxes[:, columns]) for columns in ((0, 2), (1, 3)))
    covered = np.zeros((max(len(ys) - 1, 0), max(len(xs) - 1, 0)), dtype=bool)  # cells between neighbouring edges
    for x0, y0, x1, y1 in boxes:
        covered[
            np.searchsorted(ys, y0) : np.searchsorted(ys, y1), np.searchsorted(xs, x0) : np.searchsorted(xs, x1)
        ] = 1
    return float((covered * np.diff(ys)[:, None] * np.diff(xs)).sum())


def cut_into_quadrants(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes cut at both axes of the page.

    Args:
        boxes: n × 4, on the page.

    Returns:
        P quadrant numbers (0 upper left, 1 upper right, 2 lower left, 3 lower right); P × 4 boxes of the parts; P
        shares: of each part in the area of the box it was cut from.
    """
    numbers, parts, shares = [], [], []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for number in range(4):
        left, top = CENTER * (number % 2), CENTER * (number // 2)
        part = boxes.clip((left, top, left, top), (left + CENTER, top + CENTER, left + CENTER, top + CENTER))
        widths, heights = part[:, 2] - part[:, 0], part[:, 3] - part[:, 1]
        real = (widths >= THINNEST) & (heights >= THINNEST)
        numbers.append(np.full(int(real.sum()), number))
        parts.append(part[real])
        shares.append((widths * heights)[real] / areas[real])
    return np.concatenate(numbers), np.concatenate(parts), np.concatenate(shares)


def _on_page(element: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """The element's box clipped to the page; None when nothing is left."""
    x0, y0, x1, y1 = (min(max(float(element[name]), 0.0), 1.0) for name in ("x0", "y0", "x1", "y1"))
    return (x0, y0, x1, y1) if min(x1 - x0, y1 - y0) >= THINNEST else None


def _quadrant_sums(quadrants: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of `values` (P) by quadrant, over the largest of the four sums; all 0 where there is nothing."""
    sums = np.bincount(quadrants, weights=values, minlength=4)
    return sums / sums.max() if sums.max() > 0 else sums


def _distinct(values: np.ndarray) -> np.ndarray:
    """The different ones of `values`, ascending; those within SAME_LINE of the one before are the same."""
    ordered = np.sort(values)
    return ordered[np.diff(ordered, prepend=-np.inf) > SAME_LINE]


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
