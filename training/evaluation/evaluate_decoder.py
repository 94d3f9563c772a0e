"""Measure how well the poster decoder follows held-out briefs: its posters are read by encoder and abstractor.

python training/evaluation/evaluate_decoder.py --model runs/posters/decoder_64 --reader runs/posters/abstractor_tiny \\
    --dataset_name data/posters_standard_64
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.common.poster_domain import GRAMMAR
from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.grids import comparison_grid
from training.core.files import write_json
from training.core.options import Options, option
from training.core.parsing import parse_config
from training.core.previews import save_png
from training.engine.launch import threads_per_process
from training.metrics.cycle import cycle_metrics, palette_distance

GRID_BRIEFS = 8
BATCH = 16


@dataclass
class DecoderEvaluationConfig(Options):
    """Flags of evaluate_decoder.py."""

    model: str = ""
    """The decoder: a run, a checkpoint or a pipeline"""
    reader: str = ""
    """A run of train_abstractor.py that was given an encoder, for posters of the decoder's size"""
    dataset_name: str = "data/posters_standard_64"
    """Posters of data_scripts/make_posters.py, of the decoder's size"""
    split: str = "test"
    """Briefs are taken from here"""
    num_briefs: int = option(64, at_least=3)
    """How many of them"""
    num_inference_steps: int = 50
    """Sampling steps"""
    guidance_scale: float = 2.0
    """Classifier-free guidance"""
    scheduler: str | None = None
    """Another sampler than the pipeline's own"""
    seed: int = 0
    """Poster i is drawn from seed + i"""
    device: str | None = None
    """Where models run: cpu, cuda, cuda:1, mps, ...; unset: the GPU if there is one, otherwise the CPU"""
    grid: str | None = None
    """Where a grid of real, painted and read posters goes (PNG); unset: no grid"""
    output: str | None = None
    """Where the figures go (JSON); unset: only printed"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        for name, what in (("model", "the decoder"), ("reader", "a run of train_abstractor.py")):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; name {what}: a run, a checkpoint or a pipeline folder")


def evaluate(config: DecoderEvaluationConfig) -> dict[str, float]:
    """Figures of `cycle_metrics` for painted posters, and for the real ones of the same briefs (`real_…`): what reading
    alone costs.

    Raises:
        UserError: no such model or data, or a reader that reads no pictures or no grammar.
    """
    from pipelines.tools.loading import load_on_device
    from training.data.briefs import brief_of
    from training.data.images import DataConfig, load_split
    from training.data.posters import NUMBER_COLUMNS, require_poster_columns

    torch.set_num_threads(threads_per_process())
    decoder, reader = (load_on_device(path, config.device) for path in (config.model, config.reader))
    _check_kinds(decoder, reader, config)
    if config.scheduler:
        decoder.set_scheduler(config.scheduler)
    decoder.set_progress_bar_config(desc="painting posters")
    rows = load_split(DataConfig(dataset_name=config.dataset_name), config.split, 0)
    require_poster_columns(rows, ["image", "palette", *NUMBER_COLUMNS], config.dataset_name)
    posters = [rows[i] for i in range(min(config.num_briefs, len(rows)))]
    briefs = [brief_of(row) for row in posters]
    painted: list[Image.Image] = []
    for start in range(0, len(briefs), BATCH):
        generators = [torch.Generator().manual_seed(config.seed + i) for i in range(start, len(briefs))[:BATCH]]
        painted += decoder(
            briefs[start : start + BATCH],
            generator=generators,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        ).images
    read = reader(painted)
    figures = _figures(painted, read, posters)
    real = _figures([row["image"] for row in posters], reader([row["image"] for row in posters]), posters)
    figures |= {f"real_{name}": value for name, value in real.items()}
    if config.grid:
        shown = [[row["image"], image, mark] for row, image, mark in zip(posters, painted, read.overlays)][:GRID_BRIEFS]
        titles = ["a real poster of this brief", "painted", "as it is read"]
        words = [brief.describe() for brief in briefs[:GRID_BRIEFS]]
        save_png(comparison_grid(shown, titles, row_titles=words), config.grid)
    if config.output:
        write_json(config.output, figures)
    return figures


def _check_kinds(decoder: Any, reader: Any, config: DecoderEvaluationConfig) -> None:
    if not hasattr(decoder, "brief_encoder"):
        raise UserError(f"--model {config.model} is a {type(decoder).__name__}; name a run of train_decoder.py")
    if getattr(reader, "encoder", None) is None or getattr(reader, "abstractor", None) is None:
        raise UserError(f"--reader {config.reader} must be a run of train_abstractor.py that was given an --encoder")


def _figures(images: Sequence[Image.Image], read: Any, posters: Sequence[dict[str, Any]]) -> dict[str, float]:
    asked = np.array([[row[name] for name in GRAMMAR] for row in posters])
    found = np.array([[numbers[name] for name in GRAMMAR] for numbers in read.grammar])
    pixels = [np.asarray(image.convert("RGB")) for image in images]
    outside = [features[1] < 0.5 for features in read.features]
    distances = [[palette_distance(p, o, row["palette"]) for row in posters] for p, o in zip(pixels, outside)]
    return cycle_metrics(
        asked,
        found,
        np.array([row["pictures"] for row in posters]),
        np.array([counts["pictures"] for counts in read.counts]),
        np.array(distances),
    )


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(DecoderEvaluationConfig, argv, description=__doc__)
    for name, value in evaluate(config).items():
        print(f"{name} {value:.4f}")


if __name__ == "__main__":
    entry_point(main)
