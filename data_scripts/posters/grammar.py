"""Design grammar (V_Grammar): eight measures of a layout in [0, 1], computed only from the boxes of its elements.

Six are those of Ngo, Teo and Byrne, "Modelling interface aesthetics", Information Sciences 152 (2003), as printed
there; hierarchy contrast and image share were added here. The page is the unit square, x to the right, y downwards, its
centre (x_c, y_c) = (1/2, 1/2), so that b_frame = h_frame = a_frame = 1.

The paper leaves some points open. They are decided as follows:
- Elements of every kind count. They are clipped to the page, and n is the number of those that remain. A box thinner
  than THINNEST is empty.
- A box that crosses an axis of the page is cut at the axis, and each part counts in its own quadrant. Where the paper
  counts elements instead of areas (symmetry and rhythm), a part is weighted by its share of the element's area. So an
  element counts once in total, and a sliver across the axis has almost no effect.
- "Normalised" sums of the four quadrants are divided by the largest of the four, as in balance.
- 0/0 is 0, because sides or quadrants that are all empty do not differ. So an empty page has perfect balance,
  equilibrium, symmetry, regularity and rhythm; its density, hierarchy contrast and image share are 0.

Legend: n boxes (x0, y0, x1, y1), P parts of boxes, 4 quadrants: upper left, upper right, lower left, lower right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from pipelines.common.poster_domain import GRAMMAR

THINNEST = 1e-6
"""Minimum width and height of a box, as a fraction of the side of the page."""
SAME_LINE = 1 / 512
"""Edges and distances that differ by at most this count as equal: half a pixel at 256 px, which nobody can see."""

CENTER = 0.5
VERTICAL_PAIRS = ((0, 1), (2, 3))
"""Quadrants that are mirrored in the vertical axis: upper left and right, lower left and right."""
HORIZONTAL_PAIRS = ((0, 2), (1, 3))
RADIAL_PAIRS = ((0, 3), (1, 2))


def design_grammar(elements: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Compute V_Grammar, the eight measures of a layout.

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
    return {name: min(max(values[name], 0.0), 1.0) for name in GRAMMAR}  # removes rounding errors only


def balance(boxes: np.ndarray) -> float:
    """Compute how equal the visual weights of opposite sides are:

    BM = 1 - (|BM_vertical| + |BM_horizontal|) / 2,
    BM_vertical = (w_L - w_R) / max(w_L, w_R), BM_horizontal = (w_T - w_B) / max(w_T, w_B), w_j = sum_i a_ij d_ij,
    where a_ij is the area of element i on side j, and d_ij the distance between the central line of that part of the
    element and the central line of the page.

    Args:
        boxes: n × 4, on the page.
    """
    imbalance = 0.0
    for low, high, across in ((0, 2, boxes[:, 3] - boxes[:, 1]), (1, 3, boxes[:, 2] - boxes[:, 0])):
        before = np.clip(CENTER - boxes[:, (low, high)], 0, None)  # distances of both edges from the axis: n × 2
        after = np.clip(boxes[:, (low, high)] - CENTER, 0, None)
        # A part between distances a and b has area times distance (b - a)(b + a)/2 times its extent along the axis.
        weight_before = float((across * (before[:, 0] ** 2 - before[:, 1] ** 2)).sum()) / 2
        weight_after = float((across * (after[:, 1] ** 2 - after[:, 0] ** 2)).sum()) / 2
        imbalance += abs(_ratio(weight_before - weight_after, max(weight_before, weight_after)))
    return 1 - imbalance / 2


def equilibrium(boxes: np.ndarray) -> float:
    """Compute how close the centre of mass is to the centre of the page:

    EM = 1 - (|EM_x| + |EM_y|) / 2,
    EM_x = 2 sum_i a_i (x_i - x_c) / (n b_frame sum_i a_i), and EM_y with y and h_frame likewise. The n in
    the denominator is from the paper; because of it, a layout of many elements is always close to equilibrium.

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
    """Compute how similar the quadrants are when mirrored in the vertical axis, the horizontal axis and the centre:

    SYM = 1 - (SYM_vertical + SYM_horizontal + SYM_radial) / 3,
    SYM_vertical = sum over V in (X, Y, H, B, Theta, R) of (|V'_UL - V'_UR| + |V'_LL - V'_LR|) / 12; for SYM_horizontal
    the pairs are UL and LL, UR and LR; for SYM_radial they are UL and LR, UR and LL. V_j is a sum over the elements
    of quadrant j: X_j = |x_ij - x_c|, Y_j = |y_ij - y_c|, H_j = height, B_j = breadth,
    Theta_j = |y_ij - y_c| / |x_ij - x_c|, R_j = distance between the centres; V' is V divided by the largest V of the
    four quadrants.

    Args:
        boxes: n × 4, on the page.
    """
    quadrants, parts, shares = cut_into_quadrants(boxes)
    x = np.abs((parts[:, 0] + parts[:, 2]) / 2 - CENTER)
    y = np.abs((parts[:, 1] + parts[:, 3]) / 2 - CENTER)
    breadths, heights = parts[:, 2] - parts[:, 0], parts[:, 3] - parts[:, 1]
    measured = (x, y, heights, breadths, y / x, np.hypot(x, y))  # x is not 0, because a part has an extent
    sums = np.array([_quadrant_sums(quadrants, shares * values) for values in measured])
    unlike = 0.0
    for pairs in (VERTICAL_PAIRS, HORIZONTAL_PAIRS, RADIAL_PAIRS):
        unlike += sum(float(np.abs(sums[:, a] - sums[:, b]).sum()) for a, b in pairs) / 12
    return 1 - unlike / 3


def regularity(boxes: np.ndarray) -> float:
    """Compute how few distinct alignment lines and distances the layout has:

    RM = (RM_alignment + RM_spacing) / 2, where both are 1 for a single element, otherwise
    RM_alignment = 1 - (n_vap + n_hap) / (2n), RM_spacing = 1 - (n_spacing - 1) / (2 (n - 1)),
    where n_vap and n_hap are the numbers of distinct left and upper edges (the starts of columns and rows), and
    n_spacing is the number of distinct distances between consecutive starts. If all elements start at one point, no
    distance exists and RM_spacing is 1.

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
    """Compute how evenly the elements are distributed over the quadrants:

    RHM = 1 - (RHM_x + RHM_y + RHM_area) / 3, RHM_x = sum over the six pairs of quadrants of |X'_j - X'_k| / 6, where
    X_j is the sum of |x_ij - x_c| over the elements of quadrant j; RHM_y and RHM_area use y and areas likewise. The
    minimum is 1/3: among four numbers in [0, 1], at most four of the six pairs can differ by 1.

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
    """Compute how close the elements come to filling half of the page: DM = 1 - 2 |1/2 - sum_i a_i / a_frame|.

    The areas of overlapping elements can add up to more than the page, which counts as a full page, of density 0.

    Args:
        boxes: n × 4, on the page.
    """
    filled = float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum())
    return 1 - 2 * abs(0.5 - min(filled, 1.0))


def hierarchy_contrast(hierarchies: Iterable[float]) -> float:
    """Compute how much the elements differ in hierarchy: the RMS contrast, 2 sqrt(mean_i (h_i - mean h)²).

    This is twice the standard deviation, so that half of the elements at 0 and half at 1 give 1. All elements have
    equal weight, whatever their area: a line of small print says as much about the reading order as the picture beside
    it. The contrast is 0 for fewer than two elements.

    Args:
        hierarchies: one number per element, clipped to [0, 1].
    """
    values = np.clip(np.array(list(hierarchies), dtype=np.float64), 0, 1)
    return 2 * float(values.std()) if len(values) > 1 else 0.0


def image_share(boxes: np.ndarray) -> float:
    """Compute the fraction of the page that pictures cover; overlaps count once.

    Args:
        boxes: n × 4, the boxes of the pictures on the page.
    """
    xs, ys = (np.unique(boxes[:, columns]) for columns in ((0, 2), (1, 3)))
    covered = np.zeros((max(len(ys) - 1, 0), max(len(xs) - 1, 0)), dtype=bool)  # cells of the grid that all edges form
    for x0, y0, x1, y1 in boxes:
        covered[
            np.searchsorted(ys, y0) : np.searchsorted(ys, y1), np.searchsorted(xs, x0) : np.searchsorted(xs, x1)
        ] = 1
    return float((covered * np.diff(ys)[:, None] * np.diff(xs)).sum())


def cut_into_quadrants(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut boxes at both axes of the page.

    Args:
        boxes: n × 4, on the page.

    Returns:
        P quadrant numbers (0 upper left, 1 upper right, 2 lower left, 3 lower right), P × 4 boxes of the parts, and P
        shares: the area of each part as a fraction of the area of its whole box.
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
    """Clip the element's box to the page; return None if nothing is left."""
    x0, y0, x1, y1 = (min(max(float(element[name]), 0.0), 1.0) for name in ("x0", "y0", "x1", "y1"))
    return (x0, y0, x1, y1) if min(x1 - x0, y1 - y0) >= THINNEST else None


def _quadrant_sums(quadrants: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum `values` (P) by quadrant and divide by the largest of the four sums; all are 0 without any part."""
    sums = np.bincount(quadrants, weights=values, minlength=4)
    return sums / sums.max() if sums.max() > 0 else sums


def _distinct(values: np.ndarray) -> np.ndarray:
    """Return the distinct `values` in ascending order; values within SAME_LINE of the previous one are dropped."""
    ordered = np.sort(values)
    return ordered[np.diff(ordered, prepend=-np.inf) > SAME_LINE]


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
