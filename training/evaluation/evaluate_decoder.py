"""Measure how well the poster decoder follows held-out briefs: encoder and abstractor read the generated posters.

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
    """Poster decoder (required): run folder, checkpoint, pipeline folder or Hub id"""
    reader: str = ""
    """Run folder of train_abstractor.py (required), trained with --encoder on posters of the decoder's size"""
    dataset_name: str = "data/posters_standard_64"
    """Posters made with data_scripts/make_posters.py, of the decoder's size"""
    split: str = "test"
    """Split with the briefs"""
    num_briefs: int = option(64, at_least=3)
    """Number of briefs"""
    num_inference_steps: int = 50
    """Number of sampling steps"""
    guidance_scale: float = 2.0
    """Scale of classifier-free guidance"""
    scheduler: str | None = None
    """Scheduler for sampling; if unset, that of the pipeline"""
    seed: int = 0
    """Random seed; poster i is generated with seed + i"""
    device: str | None = None
    """Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"""
    grid: str | None = None
    """File for a grid of real posters, generated posters and what is read from them (PNG); if unset, no grid is
    written"""
    output: str | None = None
    """File for the metrics (JSON); if unset, they are only printed"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        for name, what in (("model", "the decoder"), ("reader", "a run of train_abstractor.py")):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; give {what}: a run, a checkpoint or a pipeline folder")


def evaluate(config: DecoderEvaluationConfig) -> dict[str, float]:
    """Compute `cycle_metrics` of generated posters and of the real posters of the same briefs (`real_…`).

    The values for real posters show the errors of the reader alone.

    Raises:
        UserError: a model or the data do not exist, or the models are not a decoder and a reader of posters.
    """
    from pipelines.tools.loading import load_on_device
    from training.data.briefs import brief_of
    from training.data.images import DataConfig, decoded_rows, load_split
    from training.data.posters import NUMBER_COLUMNS, require_poster_columns

    torch.set_num_threads(threads_per_process())
    decoder, reader = (load_on_device(path, config.device) for path in (config.model, config.reader))
    _check_kinds(decoder, reader, config)
    if config.scheduler:
        decoder.set_scheduler(config.scheduler)
    decoder.set_progress_bar_config(desc="generating posters")
    data = DataConfig(dataset_name=config.dataset_name)
    rows = load_split(data, config.split, 0)
    require_poster_columns(rows, ["image", "palette", *NUMBER_COLUMNS], config.dataset_name)
    posters = decoded_rows(rows, data, config.num_briefs)
    briefs = [brief_of(row) for row in posters]
    generated: list[Image.Image] = []
    for start in range(0, len(briefs), BATCH):
        generators = [torch.Generator().manual_seed(config.seed + i) for i in range(start, len(briefs))[:BATCH]]
        generated += decoder(
            briefs[start : start + BATCH],
            generator=generators,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        ).images
    read = reader(generated)
    metrics = _metrics(generated, read, posters)
    real = _metrics([row["image"] for row in posters], reader([row["image"] for row in posters]), posters)
    metrics |= {f"real_{name}": value for name, value in real.items()}
    if config.grid:
        columns = zip(posters, generated, read.overlays)
        shown = [[row["image"], image, overlay] for row, image, overlay in columns][:GRID_BRIEFS]
        titles = ["real poster of this brief", "generated", "as read"]
        words = [brief.describe() for brief in briefs[:GRID_BRIEFS]]
        save_png(comparison_grid(shown, titles, row_titles=words), config.grid)
    if config.output:
        write_json(config.output, metrics)
    return metrics


def _check_kinds(decoder: Any, reader: Any, config: DecoderEvaluationConfig) -> None:
    if not hasattr(decoder, "brief_encoder"):
        raise UserError(f"--model {config.model} is a {type(decoder).__name__}; give a run of train_decoder.py")
    if getattr(reader, "encoder", None) is None or getattr(reader, "abstractor", None) is None:
        raise UserError(f"--reader {config.reader} cannot read posters; give a train_abstractor.py run with --encoder")


def _metrics(images: Sequence[Image.Image], read: Any, posters: Sequence[dict[str, Any]]) -> dict[str, float]:
    target = np.array([[row[name] for name in GRAMMAR] for row in posters])
    grammar = np.array([[numbers[name] for name in GRAMMAR] for numbers in read.grammar])
    pixels = [np.asarray(image.convert("RGB")) for image in images]
    outside = [features[1] < 0.5 for features in read.features]
    distances = [[palette_distance(p, o, row["palette"]) for row in posters] for p, o in zip(pixels, outside)]
    return cycle_metrics(
        target,
        grammar,
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
