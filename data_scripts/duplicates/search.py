"""Finds the near-duplicates among the prints of N images: close hashes are candidates, thumbnails decide.

N images, P pairs. Thumbnails are compared after one has been fitted to the other, so that a copy from which a small
border was cut off is recognized, while images that only look alike (posters of one style, faces with another mouth)
keep a difference somewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from data_scripts.duplicates.prints import INNER, MIRRORED, MIRRORED_INNER, THUMBNAIL, WHOLE, Prints

BLOCK = 512  # images that are compared at once with as many others; larger blocks leave the cache of the processor
PAIRS = 256  # pairs whose thumbnails are compared at once; more of them leave the cache as well
FITTINGS = 3  # each moves the thumbnail by about a pixel at most
LARGEST_CUT = 0.16  # share of a side by which a copy may be smaller
PATCH = 4  # pixels of the side of a patch
# Maximum differences of copies, of values in [0, 1]: of all pixels, and of the patch with the largest difference. They,
# and the default distance of hashes, were chosen on emoji, photographs and posters; docs/data.md has the measurements.
LIMITS, FITTED_LIMITS = (0.045, 0.06), (0.045, 0.1)
COARSE_LIMIT = 0.12
MOST_LEFT = 0.6  # share of the difference that may be left after fitting
GIVEN_UP = 3  # times the limit, after a step


class Pair(NamedTuple):
    """Two images that are near-duplicates, by their positions in the prints (`one` < `other`)."""

    one: int
    other: int
    difference: float
    """root mean square difference of the fitted thumbnails, of values in [0, 1]"""


def near_duplicates(prints: Prints, distance: int, tick: Callable[[], object] = lambda: None) -> list[Pair]:
    """Return all pairs of near-duplicates, the closest first.

    Args:
        distance: maximum number of different bits of two hashes, of 64.
        tick: called after each of the `comparisons`.
    """
    if len(prints.places) < 2:
        return []
    hashes, thumbnails = np.stack(prints.hashes), np.stack(prints.thumbnails)
    coarse = _coarse(thumbnails)
    pairs: list[Pair] = []

    def compare(block: tuple[int, int]) -> list[Pair]:
        found = []
        for one, other, mirrored in candidates(hashes, *block, distance):
            turned = slice(None, None, -1 if mirrored else 1)
            alike = np.square(coarse[one] - coarse[other][:, :, turned]).mean((1, 2, 3)) <= COARSE_LIMIT**2
            one, other = one[alike], other[alike]
            close, differences = are_copies(thumbnails[one], thumbnails[other][:, :, turned])
            chosen = zip(one[close], other[close], differences[close])
            found += [Pair(int(i), int(j), float(difference)) for i, j, difference in chosen]
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(compare, comparisons(len(hashes))):
            pairs += found
            tick()
    closest: dict[tuple[int, int], Pair] = {}  # an image may be close to another one and to its mirror image
    for pair in sorted(pairs, key=lambda pair: pair.difference):
        closest.setdefault(pair[:2], pair)
    return list(closest.values())


def comparisons(number: int) -> list[tuple[int, int]]:
    """Return the blocks (start of one, start of the other) into which the comparison of all pairs is divided."""
    starts = range(0, number, BLOCK)
    return [(one, other) for one in starts for other in starts if one <= other]


def candidates(
    hashes: np.ndarray, start: int, other_start: int, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield (ones, others, whether they are mirrored) for the pairs of two blocks with close hashes, P at a time."""
    ones, others = hashes[start : start + BLOCK], hashes[other_start : other_start + BLOCK]
    for mirrored, whole, inner in ((False, WHOLE, INNER), (True, MIRRORED, MIRRORED_INNER)):
        close = _close(ones[:, whole], others[:, WHOLE], distance)
        close |= _close(ones[:, inner], others[:, WHOLE], distance)
        close |= _close(ones[:, WHOLE], others[:, inner], distance)
        one, other = np.nonzero(np.triu(close, 1) if start == other_start else close)
        for first in range(0, len(one), PAIRS):
            yield start + one[first : first + PAIRS], other_start + other[first : first + PAIRS], mirrored


def _close(ones: np.ndarray, others: np.ndarray, distance: int) -> np.ndarray:
    return np.bitwise_count(ones[:, None] ^ others[None, :]) <= distance


def _blurred(thumbnails: np.ndarray) -> np.ndarray:
    """Return thumbnails as float32 in [0, 1], slightly blurred, so that a shift by half a pixel matters less."""
    values = thumbnails.astype(np.float32) / 255
    for axis in (1, 2):
        before = np.concatenate([values.take([0], axis), values.take(range(THUMBNAIL - 1), axis)], axis)
        after = np.concatenate([values.take(range(1, THUMBNAIL), axis), values.take([-1], axis)], axis)
        values = (before + 2 * values + after) / 4
    return values


def are_copies(ones: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for P pairs of thumbnails whether they show copies (P bool), and how much they differ (P, see `Pair`).

    A copy differs little everywhere (`LIMITS`). If a border was cut off, it does so after fitting (`FITTED_LIMITS`),
    and fitting has removed much of the difference; otherwise posters that differ in one word would be copies.
    """
    one, other = _blurred(ones), _blurred(others)
    before = _differences(one - other)
    after = _fitted_differences(one, other, before)
    fits = (after <= FITTED_LIMITS).all(1) & (after[:, 0] <= MOST_LEFT * before[:, 0])
    return (before <= LIMITS).all(1) | fits, after[:, 0]


def _fitted_differences(ones: np.ndarray, others: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the differences of P pairs (P 2) after each of `ones` was fitted to its other; the smallest of all steps.

    Fitting moves the four edges by at most `LARGEST_CUT` of the side: Gauss-Newton steps on the squared difference,
    with the gradient of the image as derivative (Lucas and Kanade 1981). Pairs that are still far from the limit after
    a step are given up.
    """
    best, kept = before.copy(), np.arange(len(ones))
    spans = np.tile(np.array([0.0, 1.0], np.float32), (len(ones), 2, 1))  # of y and x: start and end of the window
    moved = ones
    for _ in range(FITTINGS):
        if not len(kept):
            break
        spans = spans + _step(moved, others[kept])
        spans = spans.clip([-LARGEST_CUT, 1 - LARGEST_CUT], [LARGEST_CUT, 1 + LARGEST_CUT]).astype(np.float32)
        moved = _windows(ones[kept], spans)
        now = _differences(moved - others[kept])
        best[kept] = np.where(now[:, :1] < best[kept, :1], now, best[kept])
        promising = now[:, 0] <= GIVEN_UP * FITTED_LIMITS[0]
        kept, spans, moved = kept[promising], spans[promising], moved[promising]
    return best


def _coarse(thumbnails: np.ndarray) -> np.ndarray:
    """Return the mean colours of 4 × 4 parts of N thumbnails (N 4 4 3), which cutting a border off hardly changes."""
    part = THUMBNAIL // 4
    return thumbnails.reshape(-1, 4, part, 4, part, 3).mean((2, 4), dtype=np.float32) / 255


def _differences(difference: np.ndarray) -> np.ndarray:
    """Return the root mean squares (P 2) of differences of thumbnails: of all pixels, and the largest of a patch."""
    side = THUMBNAIL // PATCH
    patches = (difference**2).reshape(-1, side, PATCH, side, PATCH, 3).mean((2, 4, 5))
    return np.sqrt(np.stack([patches.mean((1, 2)), patches.max((1, 2))], axis=1))


def _step(moved: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the changes of the starts and ends of the windows (P 2 2) that reduce the difference most."""
    place = ((np.arange(THUMBNAIL, dtype=np.float32) + 0.5) / THUMBNAIL).reshape(-1, 1, 1)
    along_y = np.gradient(moved, axis=1) * THUMBNAIL
    along_x = np.gradient(moved, axis=2) * THUMBNAIL
    x = place.reshape(1, -1, 1)
    derivatives = [along_y * (1 - place), along_y * place, along_x * (1 - x), along_x * x]
    matrix = np.stack([part.reshape(len(moved), -1) for part in derivatives], axis=1)  # P 4 values
    product = matrix @ matrix.transpose(0, 2, 1) + np.eye(4, dtype=np.float32) * 1e-2
    target = matrix @ (others - moved).reshape(len(moved), -1, 1)
    step = np.linalg.solve(product, target)[..., 0]
    return step.clip(-1 / 16, 1 / 16).reshape(-1, 2, 2)


def _windows(thumbnails: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Return windows of the thumbnails, resampled linearly to the full size; outside, the edge is repeated."""
    rows, columns = _resampling(spans[:, 0]), _resampling(spans[:, 1])
    by_rows = (rows @ thumbnails.reshape(len(thumbnails), THUMBNAIL, -1)).reshape(thumbnails.shape)
    turned = columns @ by_rows.transpose(0, 2, 1, 3).reshape(len(thumbnails), THUMBNAIL, -1)
    return turned.reshape(thumbnails.shape).transpose(0, 2, 1, 3)


def _resampling(spans: np.ndarray) -> np.ndarray:
    """Return the matrices (P `THUMBNAIL` `THUMBNAIL`) that resample windows from start to end of one axis."""
    steps = (np.arange(THUMBNAIL, dtype=np.float32) + 0.5) / THUMBNAIL
    places = (spans[:, :1] + steps * (spans[:, 1:] - spans[:, :1])) * THUMBNAIL - 0.5
    distances = np.abs(places.clip(0, THUMBNAIL - 1)[:, :, None] - np.arange(THUMBNAIL, dtype=np.float32))
    return (1 - distances).clip(min=0).astype(np.float32)
