"""Measurements that `make bench` leaves out because they take minutes: posters, the poster decoder, captions."""

from __future__ import annotations

import sys
import tempfile

from training.benchmarks.children import measured_by, timed
from training.benchmarks.inputs import BenchmarkConfig, Inputs
from training.benchmarks.results import Metric

DRAWN_POSTERS = 800
CAPTION_BATCHES = {"tiny": (0, 16, 64, 128), "default": (0, 1, 2, 4, 8)}


def measure_posters(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Measure the posters made per second at 256 px with two processes, including their start and the writing."""
    metrics = []
    for complexity, goal in (("plain", 40), ("standard", 40), ("rich", None)):
        with tempfile.TemporaryDirectory() as folder:
            command = (
                f"data_scripts/make_posters.py --output_dir {folder}/posters --num_posters {DRAWN_POSTERS} "
                f"--resolution 256 --num_workers 2 --complexity {complexity}"
            )
            rate = DRAWN_POSTERS / timed([sys.executable, *command.split()])
        metrics.append(Metric(f"make_posters.py, {complexity}, 256 px, 2 processes", rate, "posters/s", goal))
    return metrics


def measure_decoder(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Measure the memory of a training step of the poster decoder at its default size: the base, and per image."""
    peaks = []
    for batch_size in (0, 1, 2):
        peaks.append(measured_by("decoder", f"--batch_size {batch_size}")["peak_mb"])
    return [
        Metric("poster decoder, 256 px, float32: model, gradients, optimizer", peaks[0], "MB"),
        Metric("poster decoder, 256 px, float32: each image of a batch", peaks[2] - peaks[1], "MB"),
    ]


def measure_captions(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Measure caption generation with a cache against full forward passes, and the memory and speed of training."""
    results = measured_by("captions", "--side generation --batch_size 8 --tokens 100")
    metrics = [
        Metric("captions, batch 8, 100 tokens: with the cache", results["cached_seconds"], "s"),
        Metric("captions, batch 8, 100 tokens: loop of full forwards", results["full_seconds"], "s"),
        Metric("captions: the cache's speed over the loop's", results["speedup"], "", 5),
        Metric("captions: share of tokens that are the same", results["equal_tokens"], "", 1),
    ]
    for preset, batch_sizes in CAPTION_BATCHES.items():
        for size in batch_sizes:
            results = measured_by("captions", f"--side memory --preset {preset} --batch_size {size}")
            name = f"image_caption/{preset}.yaml, batch {size}"
            metrics.append(Metric(f"{name}: peak memory", results["peak_mb"], "MB"))
            if size:
                metrics.append(Metric(f"{name}: training", results["pairs_per_second"], "images/s"))
    return metrics
