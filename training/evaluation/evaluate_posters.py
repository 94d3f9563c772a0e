"""Measure how well posters of latent diffusion follow held-out briefs, and draw a grid of them.

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
    """A run, a checkpoint or a pipeline"""
    dataset_name: str = "data/posters_64"
    """Posters of data_scripts/make_posters.py"""
    split: str = "test"
    """Briefs are taken from here"""
    num_briefs: int = 64
    """How many of them"""
    num_inference_steps: int = 25
    """Sampling steps"""
    guidance_scale: float = 2.5
    """Classifier-free guidance"""
    scheduler: str | None = None
    """Another sampler than the pipeline's own"""
    seed: int = 0
    """Poster i is drawn from seed + i"""
    device: str | None = None
    """Where models run: cpu, cuda, cuda:1, mps, ...; unset: the GPU if there is one, otherwise the CPU"""
    grid_rows: int = 8
    """Briefs shown in the grid"""
    grid: str | None = None
    """Where the grid goes (PNG); unset: no grid"""
    output: str | None = None
    """Where the figures go (JSON); unset: only printed"""


def generate(pipeline: Any, prompts: Sequence[str], config: EvaluationConfig, variant: int = 0) -> list[Image.Image]:
    """One poster per prompt, each from a seed of its own."""
    generators = [torch.Generator().manual_seed(config.seed + i + 10_000 * variant) for i in range(len(prompts))]
    return pipeline(
        list(prompts),
        generator=generators,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    ).images


def evaluate(config: EvaluationConfig) -> dict[str, float]:
    """Figures of `measure_posters`; writes the grid and the JSON file where they were asked for.

    Raises:
        UserError: no such model or data.
    """
    from pipelines.tools.loading import load_on_device
    from training.data.images import DataConfig, load_split

    torch.set_num_threads(threads_per_process())
    pipeline = load_on_device(config.model, config.device)
    if config.scheduler:
        pipeline.set_scheduler(config.scheduler)
    pipeline.set_progress_bar_config(desc="drawing posters")
    rows = load_split(DataConfig(dataset_name=config.dataset_name), config.split, 0)
    if "palette" not in rows.column_names:
        maker = command("data_scripts/make_posters.py")
        raise UserError(f"{config.dataset_name} holds no briefs; give posters that {maker} made")
    briefs = [rows[i] for i in range(min(config.num_briefs, len(rows)))]
    posters = generate(pipeline, [brief["text"] for brief in briefs], config)
    figures = measure_posters(posters, briefs, [brief["image"] for brief in briefs])
    if config.grid:
        save_png(_grid(pipeline, briefs, posters, config), config.grid)
    if config.output:
        write_json(config.output, figures)
    return figures


def _grid(pipeline: Any, briefs: list[dict], posters: list[Image.Image], config: EvaluationConfig) -> Image.Image:
    """Rows are briefs, of as many styles as there are: a real poster of the brief, and three generated ones."""
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
    titles = ["a real poster of this brief", "generated", "generated", "generated"]
    return comparison_grid(rows, titles, row_titles=prompts)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(EvaluationConfig, argv, description=__doc__)
    if not config.model:
        raise UserError("no model was named; give --model a run, a checkpoint or a pipeline folder")
    for name, value in evaluate(config).items():
        print(f"{name} {value:.3f}")


if __name__ == "__main__":
    entry_point(main)
