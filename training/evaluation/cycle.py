"""How well posters of a decoder follow their briefs, as a reader reads them, and the report of a fine-tuning.

N posters, one brief each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.common.poster_domain import GRAMMAR
from training.core.exchange import ALONE, Exchange
from training.metrics.cycle import mean_correlation, palette_distance

# Posters that are read before a request to stop is handled.
READ_AT_A_TIME = 16


@dataclass(frozen=True)
class PosterReading:
    """What a reader reads of a poster.

    Attributes:
        grammar: the grammar numbers, in the order of GRAMMAR.
        counts_agree: whether the count of the reader is that of its brief, see `picture_count_share`.
        palette_distance: mean RGB distance of the poster from the palette of its brief, from 0 to 441.
    """

    grammar: Sequence[float]
    counts_agree: bool
    palette_distance: float


def cycle_scores(
    posters: Sequence[Image.Image],
    briefs: Sequence[Any],
    reader: Any,
    exchange: Exchange = ALONE,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Compare what a reader reads of posters with their briefs; every process calls it and reads its share of them.

    Args:
        briefs: the DesignBrief of each poster, with all fields.
        reader: a LayoutAnalysisPipeline with an encoder and an abstractor.
        poll: called now and then; it may raise to stop.

    Returns:
        cycle_score: 1 - the mean correlation of the grammar numbers. grammar_correlation, picture_count_share and
        palette_distance: as in `cycle_metrics`.
    """

    def read(numbers: Sequence[int]) -> list[PosterReading]:
        poll()
        return read_posters([posters[n] for n in numbers], [briefs[n] for n in numbers], reader)

    readings = exchange.map(read, len(posters), READ_AT_A_TIME)
    asked = np.array([[getattr(brief, name) for name in GRAMMAR] for brief in briefs])
    correlation = mean_correlation(asked, np.array([reading.grammar for reading in readings]))
    return {
        "cycle_score": 1 - correlation,
        "grammar_correlation": correlation,
        "picture_count_share": float(np.mean([reading.counts_agree for reading in readings])),
        "palette_distance": float(np.mean([reading.palette_distance for reading in readings])),
    }


def read_posters(posters: Sequence[Image.Image], briefs: Sequence[Any], reader: Any) -> list[PosterReading]:
    """Read a batch of posters with their briefs; see `cycle_scores`."""
    output = reader(list(posters), overlays=False)
    return [
        PosterReading(
            [grammar[name] for name in GRAMMAR],
            counts["pictures"] == brief.pictures,
            palette_distance(np.asarray(poster.convert("RGB")), features[1] < 0.5, brief.palette),
        )
        for poster, brief, grammar, counts, features in zip(
            posters, briefs, output.grammar, output.counts, output.features, strict=True
        )
    ]


@dataclass(frozen=True)
class Row:
    """A row of the report: what was measured, its key in the measurements of a model, and how it is written."""

    title: str
    key: str
    digits: int = 3
    scale: float = 1.0


ROWS = (
    Row("1 − correlation of V_Grammar, reader", "reader_cycle_score"),
    Row("1 − correlation of V_Grammar, judge", "judge_cycle_score"),
    Row("picture_count_share, reader", "reader_picture_count_share"),
    Row("picture_count_share, judge", "judge_picture_count_share"),
    Row("palette_distance (0 to 442), reader", "reader_palette_distance", 1),
    Row("palette_distance (0 to 442), judge", "judge_palette_distance", 1),
    Row("KID × 10³", "kid", 2, 1000.0),
    Row("diversity", "diversity", 2),
)


def report_table(report: Mapping[str, Any]) -> str:
    """Return the measurements before and after as a Markdown table; what was not measured is left out.

    Args:
        report: `before`, `after` and `real` (measurements by key), and `facts` (n, floor and so on).
    """
    lines = [["", "before", "after", "real posters"], ["---", "---:", "---:", "---:"]]
    for row in ROWS:
        if row.key in report["before"]:
            cells = [_cell(report[column], row) for column in ("before", "after", "real")]
            lines.append([row.title, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(measured: Mapping[str, float], row: Row) -> str:
    if row.key not in measured:
        return "–"
    text = f"{row.scale * measured[row.key]:.{row.digits}f}"
    error = measured.get(f"{row.key}_standard_error")
    return text if error is None else f"{text} ± {row.scale * error:.{row.digits}f}"
