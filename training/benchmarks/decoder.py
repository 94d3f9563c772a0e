"""Measure the peak memory of a training step of the poster decoder at its default size of 256 px; started by run.py,
once for each batch size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.tools.cli import UserError, entry_point
from training.benchmarks.children import peak_mb
from training.core.draws import Draws
from training.core.files import write_atomically
from training.core.options import Options
from training.core.parsing import parse_config
from training.engine.launch import threads_per_process
from training.models.unet import build_pixel_unet
from training.objectives.diffusion import Diffusion
from training.stages.decoding import PosterDecoderPhase
from training.train_decoder import Config


@dataclass
class DecoderBenchConfig(Options):
    """Flags of this script."""

    batch_size: int = 1
    """Number of posters in the training step; 0 only builds the model and its optimizer"""
    output: str = ""
    """JSON file of the result"""


def peak_of_a_step(batch_size: int) -> float:
    """Return the peak resident memory of this process after one training step, in MB (10⁶ bytes)."""
    from pipelines.common.design_brief import DesignBrief, brief_tensors
    from pipelines.models.design_brief_encoder import DesignBriefEncoder

    torch.set_num_threads(threads_per_process())
    config = Config(resolution=256, output_dir="unused")
    widths = config.brief_encoder.token_width, config.brief_encoder.global_width
    unet, brief_encoder = build_pixel_unet(config.model, config.resolution, *widths), DesignBriefEncoder(*widths)
    phase = PosterDecoderPhase(config, "unet", unet, brief_encoder, Diffusion(config))
    optimizer = torch.optim.AdamW(phase.parameters(), fused=True)
    for parameter in phase.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if batch_size:
        briefs = brief_tensors([DesignBrief.random(i) for i in range(batch_size)])
        batch = {"pixel_values": torch.zeros(batch_size, 3, config.resolution, config.resolution), "brief": briefs}
        phase(batch, Draws(0, 0, range(batch_size)))[0].backward()
    return peak_mb()


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_config(DecoderBenchConfig, argv, description=__doc__)
    if not options.output:
        raise UserError("--output is missing; run training/benchmarks/run.py (make bench), which sets it")
    metrics = {"peak_mb": peak_of_a_step(options.batch_size)}
    write_atomically(Path(options.output), json.dumps(metrics) + "\n")


if __name__ == "__main__":
    entry_point(main)
