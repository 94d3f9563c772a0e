"""Measure how well posters from latent diffusion follow held-out briefs, and save a grid of them.

python training/evaluation/evaluate_posters.py --model runs/quickstart/latent_diffusion
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.commands import command
from pipelines.tools.grids import comparison_grid
from training.core.files import write_json
from training.core.options import Options
from training.core.parsing import parse_config
from training.core.previews import save_png
from training.engine.launch import threads_per_process
from training.metrics.posters import measure_posters


@dataclass
class EvaluationConfig(Options):
    """Flags of evaluate_posters.py."""

    model: str = ""
    """Latent diffusion model (required): run folder, checkpoint, pipeline folder or Hub id"""
    dataset_name: str = "data/posters_64"
    """Posters made with data_scripts/make_posters.py"""
    split: str = "test"
    """Split with the briefs"""
    num_briefs: int = 64
    """Number of briefs"""
    num_inference_steps: int = 25
    """Number of sampling steps"""
    guidance_scale: float = 2.5
    """Scale of classifier-free guidance"""
    scheduler: str | None = None
    """Scheduler for sampling; if unset, that of the pipeline"""
    seed: int = 0
    """Random seed; poster i is generated with seed + i"""
    device: str | None = None
    """Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"""
    grid_rows: int = 8
    """Number of briefs in the grid"""
    grid: str | None = None
    """File for a grid of posters (PNG); if unset, no grid is written"""
    output: str | None = None
    """File for the metrics (JSON); if unset, they are only printed"""


def generate(pipeline: Any, prompts: Sequence[str], config: EvaluationConfig, variant: int = 0) -> list[Image.Image]:
    """Generate one poster per prompt, each with a different seed."""
    generators = [torch.Generator().manual_seed(config.seed + i + 10_000 * variant) for i in range(len(prompts))]
    return pipeline(
        list(prompts),
        generator=generators,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    ).images


def evaluate(config: EvaluationConfig) -> dict[str, float]:
    """Compute `measure_posters` for generated posters, and write the grid and the JSON file if requested.

    Raises:
        UserError: the model or the data do not exist.
    """
    from pipelines.tools.loading import load_on_device
    from training.data.images import DataConfig, decoded_rows, load_split

    torch.set_num_threads(threads_per_process())
    pipeline = load_on_device(config.model, config.device)
    if config.scheduler:
        pipeline.set_scheduler(config.scheduler)
    pipeline.set_progress_bar_config(desc="generating posters")
    data = DataConfig(dataset_name=config.dataset_name)
    rows = load_split(data, config.split, 0)
    if "palette" not in rows.column_names:
        maker = command("data_scripts/make_posters.py")
        raise UserError(f"{config.dataset_name} has no briefs; give posters made with {maker}")
    briefs = decoded_rows(rows, data, config.num_briefs)
    posters = generate(pipeline, [brief["text"] for brief in briefs], config)
    metrics = measure_posters(posters, briefs, [brief["image"] for brief in briefs])
    if config.grid:
        save_png(_grid(pipeline, briefs, posters, config), config.grid)
    if config.output:
        write_json(config.output, metrics)
    return metrics


def _grid(pipeline: Any, briefs: list[dict], posters: list[Image.Image], config: EvaluationConfig) -> Image.Image:
    """Make a grid with one row per brief, with varied styles: a real poster and three generated ones."""
    shown: list[int] = []
    while True:
        fresh = [i for i in range(len(briefs)) if i not in shown]
        new = [i for i in fresh if briefs[i]["style"] not in {briefs[j]["style"] for j in shown}]
        if len(shown) >= config.grid_rows or not fresh:
            break
        shown.append((new or fresh)[0])
    prompts = [briefs[i]["text"] for i in shown]
    more = [generate(pipeline, prompts, config, variant) for variant in (1, 2)]
    rows = [[briefs[i]["image"], posters[i], *(m[n] for m in more)] for n, i in enumerate(shown)]
    titles = ["real poster of this brief", "generated", "generated", "generated"]
    return comparison_grid(rows, titles, row_titles=prompts)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(EvaluationConfig, argv, description=__doc__)
    if not config.model:
        raise UserError("--model is missing; give a run, a checkpoint or a pipeline folder")
    for name, value in evaluate(config).items():
        print(f"{name} {value:.3f}")


if __name__ == "__main__":
    entry_point(main)
