"""Measure what Halftone costs, and write docs/benchmarks.md (`make bench`).

    python training/benchmarks/run.py
    python training/benchmarks/run.py --only '[loop]' --pairs 5 --threads 1
    python training/benchmarks/run.py --only '[sampling]' --model runs/quickstart/latent_diffusion

Everything takes about ten minutes on two cores. Results of the same machine are replaced, those of others are kept.
Comparisons alternate between their sides, so that a warm, busy or slow machine affects both sides equally. Results are
still more precise on a machine without other work.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence

from pipelines.tools.cli import entry_point
from training.benchmarks.children import in_child
from training.benchmarks.inputs import BenchmarkConfig, Inputs, make_inputs
from training.benchmarks.machine import describe_machine
from training.benchmarks.page import read_machines, update_page
from training.benchmarks.results import Metric
from training.core.parsing import parse_config

MEASUREMENTS = {
    "loop": "loops.measure_loop_and_bare_loop",
    "latents": "steps.measure_latents",
    "pipeline": "sampling.measure_pipeline",
    "sampling": "sampling.measure_sampling",
    "memory": "steps.measure_memory",
    "start": "startup.measure_start",
    "loading": "loading.measure_loading",
    "accelerator": "accelerator.measure_accelerator",
    "posters": "extras.measure_posters",
    "decoder": "extras.measure_decoder",
    "captions": "extras.measure_captions",
    "scale": "scale.measure_scale",
}
"""The parts of the benchmark. Their modules are imported when they run, so that `--help` and errors appear quickly."""


def measure(part: str, config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Run one part of the benchmark and print its metrics."""
    print(f"measuring: {part} ...", flush=True)
    started = time.perf_counter()
    module, _, function = MEASUREMENTS[part].partition(".")
    metrics = getattr(importlib.import_module(f"training.benchmarks.{module}"), function)(config, inputs)
    for metric in metrics:
        print(metric.line(), flush=True)
    print(f"{time.perf_counter() - started:.0f} s\n", flush=True)
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(BenchmarkConfig, argv, description=__doc__)
    read_machines(config.page.with_suffix(".json"))  # a damaged file is reported before minutes of measurements
    machine = in_child(config.quick, describe_machine, config.thread_count)
    inputs = make_inputs(config)
    measured: dict[str, list[Metric]] = {}
    for part in config.only:
        measured[part] = measure(part, config, inputs)
        if measured[part]:  # a part without its device measures nothing
            update_page(config.page, machine, {part: measured[part]})
    metrics = [metric for part in measured.values() for metric in part]
    missed = sum(metric.met is False for metric in metrics)
    print(f"{missed} of {sum(m.goal is not None for m in metrics)} goals missed; results: {config.page}")


if __name__ == "__main__":
    entry_point(main)
