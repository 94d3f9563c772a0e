"""From points of the search space to posters with their qualities and measures: a decoder paints, a reader reads.

N posters of H × W pixels, n dimensions of the space, m measures, G grammar numbers, C counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipelines.common.design_brief import DesignBrief
from pipelines.common.pixels import to_rgb
from pipelines.common.poster_domain import COUNTS, GRAMMAR
from training.data.fingerprints import module_fingerprint
from training.innovation.originality import CopyTest
from training.innovation.quality import Reading, layout_quality, obedience, quality
from training.innovation.space import STYLE_AXES, BriefSpace
from training.metrics.generators import ImageGenerator

Evaluated = dict[str, np.ndarray]
"""What is known of N posters: `points` N n; `quality`, `obedience`, `layout`, `copy_ratio` (NaN without a test of
copies) and `is_copy` N; `measures` N m; `grammar` N G and `counts` N C as read; `noise` N; `posters` N H W 3, uint8."""


class Studio:
    """Paints and judges the posters of points.

    Args:
        generator: a poster decoder.
        reader: a `LayoutAnalysisPipeline` with encoder and abstractor.
        copies: the test of copies; None if there is none.
        measures: names of what spans the archive.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        reader: Any,
        copies: CopyTest | None,
        space: BriefSpace,
        measures: Sequence[str],
    ):
        self.generator, self.reader, self.copies = generator, reader, copies
        self.space, self.measures = space, tuple(measures)

    def __call__(self, points: np.ndarray, poll: Callable[[], None]) -> Evaluated:
        """Paint and judge a poster for each point (N × n); `poll` is called between steps and may raise to stop."""
        briefs, noises = self.space.decode(points)
        painted = self.generator([{"brief": brief} for brief in briefs], noises, poll)
        posters = [to_rgb(poster) for poster in painted]
        poll()
        readings = self._read(posters)
        poll()
        ratios = np.full(len(posters), np.nan) if self.copies is None else self.copies(posters).double().numpy()
        is_copy = np.zeros(len(posters), bool) if self.copies is None else ratios < self.copies.threshold
        obeyed = np.array([obedience(brief, reading) for brief, reading in zip(briefs, readings, strict=True)])
        layout = np.array([layout_quality(reading.grammar, self.measures) for reading in readings])
        parts = zip(obeyed.tolist(), layout.tolist(), is_copy.tolist(), strict=True)
        return {
            "points": points,
            "quality": np.array([quality(one, other, is_copy=copied) for one, other, copied in parts]),
            "obedience": obeyed,
            "layout": layout,
            "copy_ratio": ratios,
            "is_copy": is_copy,
            "measures": np.array([self._measured(*pair) for pair in zip(briefs, readings, strict=True)]),
            "grammar": np.array([[reading.grammar[name] for name in GRAMMAR] for reading in readings]),
            "counts": np.array([[reading.counts[name] for name in COUNTS] for reading in readings]),
            "noise": np.array(noises),
            "posters": np.stack([reading.pixels for reading in readings]),
        }

    def fingerprint(self) -> dict[str, str]:
        """Return hashes of the weights of both models, with what else determines a poster."""
        pipeline = self.generator.pipeline
        scheduler = dict(sorted(pipeline.scheduler.config.items()))
        return {
            "decoder": _digest(
                module_fingerprint(pipeline.denoiser, pipeline.brief_encoder), json.dumps(scheduler, default=str)
            ),
            "reader": module_fingerprint(self.reader.encoder, self.reader.abstractor),
            "training posters": "" if self.copies is None else self.copies.fingerprint,
        }

    def _read(self, posters: Sequence[Image.Image]) -> list[Reading]:
        read = self.reader(list(posters), overlays=False)
        return [
            Reading(
                {name: min(max(value, 0.0), 1.0) for name, value in grammar.items()},
                counts,
                np.asarray(poster),
                features[1] < 0.5,
            )
            for grammar, counts, poster, features in zip(read.grammar, read.counts, posters, read.features, strict=True)
        ]

    def _measured(self, brief: DesignBrief, reading: Reading) -> list[float]:
        """Return the measures of a poster: the style axes of its brief, and the grammar numbers as read."""
        return [getattr(brief, name) if name in STYLE_AXES else reading.grammar[name] for name in self.measures]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
