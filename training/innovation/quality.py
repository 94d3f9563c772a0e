"""The quality of a poster that was painted for a brief and then read: does it obey the brief, and is its layout good?

Everything is in [0, 1], where 1 is best. P pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.common.design_brief import MAX_COUNTS, DesignBrief
from pipelines.common.poster_domain import COUNTS, GRAMMAR
from training.metrics.cycle import palette_distance

AESTHETIC = ("balance", "equilibrium", "symmetry", "regularity", "rhythm")
"""Grammar numbers of which more is better (Ngo, Teo and Byrne 2003). The others say what kind of layout it is."""

# Colours of the poster domain are at least this far apart: pixels that are farther from the palette have other colours.
FARTHEST_PALETTE = 80.0


@dataclass(frozen=True)
class Reading:
    """What a reader finds on a poster.

    Args:
        grammar: the numbers of its layout, by name.
        counts: numbers of text blocks and pictures.
        pixels: the poster, H × W × 3, uint8.
        outside: which pixels are outside of pictures, H × W, bool.
    """

    grammar: Mapping[str, float]
    counts: Mapping[str, int]
    pixels: np.ndarray
    outside: np.ndarray


def obedience(brief: DesignBrief, reading: Reading) -> float:
    """Return how well a poster obeys its brief: the mean agreement over the fields that are given and can be read.

    The agreement of a grammar number is 1 minus its error; that of a count is 1 minus its error as a fraction of the
    largest count; that of the palette falls linearly with `palette_distance`, to 0 at `FARTHEST_PALETTE`. Nothing reads
    the style and the mood. A brief without any field that can be read is obeyed by every poster.
    """
    agreements = []
    for name in GRAMMAR:
        if (asked := getattr(brief, name)) is not None:
            agreements.append(1 - abs(asked - reading.grammar[name]))
    for name in COUNTS:
        if (asked := getattr(brief, name)) is not None:
            agreements.append(1 - abs(asked - reading.counts[name]) / MAX_COUNTS[name])
    if brief.palette:
        distance = palette_distance(reading.pixels, reading.outside, brief.palette)
        agreements.append(1 - min(distance / FARTHEST_PALETTE, 1.0))
    return float(np.clip(np.mean(agreements), 0, 1)) if agreements else 1.0


def layout_quality(grammar: Mapping[str, float], measures: Sequence[str]) -> float:
    """Return the mean of the numbers in `AESTHETIC`, without those that span the archive.

    An archive has a place for each value of its measures, so that low values must not count as bad.
    """
    counted = [grammar[name] for name in AESTHETIC if name not in measures]
    return float(np.clip(np.mean(counted), 0, 1)) if counted else 1.0


def quality(obeyed: float, layout: float, *, is_copy: bool) -> float:
    """Return the quality of a poster: the geometric mean of both parts, and 0 for a copy of a training poster.

    With a geometric mean, neither part can replace the other.
    """
    return 0.0 if is_copy else math.sqrt(obeyed * layout)
