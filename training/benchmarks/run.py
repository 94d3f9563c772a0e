"""Measure the overhead of Halftone over a bare PyTorch loop, and the speed of its commands (`make bench`).

    python training/benchmarks/run.py
    python training/benchmarks/run.py --only '[loop]' --pairs 5

Ratios are medians over pairs of runs that alternate, so that a warm, busy or slow machine affects both sides equally.
Results are still more precise on a machine without other work.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.resources import CODE, shipped_path
from training.core.checks import check_choice
from training.core.files import write_atomically
from training.core.options import Options, option
from training.core.parsing import parse_config

QUICKSTART = shipped_path("configs/experiments/latent_diffusion/quickstart.yaml")
QUICKSTART_AUTOENCODER = shipped_path("configs/experiments/autoencoder/quickstart.yaml")
NUM_POSTERS = 700
DRAWN_POSTERS = 800
REPETITIONS = 5
CAPTION_BATCHES = {"tiny": (0, 16, 64, 128), "default": (0, 1, 2, 4, 8)}
TRAINERS = ("train_latent_diffusion", "train_autoencoder")
FIRST_STEP_LIMIT = 120.0
"""Seconds to wait for the first step of a run before the benchmark fails."""


@dataclass
class BenchmarkConfig(Options):
    """Flags of this script."""

    only: list[str] = field(
        default_factory=lambda: ["loop", "latents", "commands", "first_step", "posters", "decoder", "captions"]
    )
    """Parts of the benchmark to run"""
    pairs: int = option(3, at_least=1)
    """Number of pairs of processes that measure the speed and the memory of the loop"""
    steps: int = option(60, at_least=10)
    """Number of measured steps in each process"""
    threads: int = 0
    """Number of CPU threads of torch; 0 uses all cores that are available to this process"""
    work_dir: str = "runs/bench"
    """Folder of the benchmark's own posters, tokenizer, autoencoder and latents"""
    output: str = "runs/bench.json"
    """JSON file of the results"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        for name in self.only:
            check_choice("only", name, tuple(MEASUREMENTS))


@dataclass(frozen=True)
class Metric:
    """One measured value, and the goal that it should meet."""

    name: str
    value: float
    unit: str = ""
    goal: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def line(self) -> str:
        """Return one line of the table: name, value, goal, and whether the goal is met."""
        goal = "" if self.goal is None else f"{'≤' if self.at_most else '≥'} {self.goal:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[self.met]
        return f"{self.name:<66} {self.value:>9.3f} {self.unit:<10} {goal:>8}  {verdict}".rstrip()


def measure_loop(config: BenchmarkConfig) -> list[Metric]:
    """Compare the loop with everything on with the bare loop: speed in whole processes and in turn, and memory."""
    recipe = write_recipe(config)
    sides: dict[str, list[dict[str, float]]] = {"bare": [], "loop": []}
    for _ in range(config.pairs):
        for side, results in sides.items():
            results.append(run_side(config, recipe, side))
    turns = run_side(config, recipe, "turns")
    pairs = list(zip(sides["loop"], sides["bare"], strict=True))
    speeds = {side: statistics.median(r["images_per_second"] for r in results) for side, results in sides.items()}
    return [
        Metric("bare loop, batch 32", speeds["bare"], "images/s"),
        Metric("loop with everything on, batch 32", speeds["loop"], "images/s"),
        Metric("speed over the bare loop, by turns in one process", turns["ratio"], "", 0.97),
        Metric(
            "speed over the bare loop, whole processes",
            statistics.median(a["images_per_second"] / b["images_per_second"] for a, b in pairs),
            "",
            0.97,
        ),
        Metric(
            "peak memory above the bare loop's, training steps",
            statistics.median(a["peak_mb"] - b["peak_mb"] for a, b in pairs),
            "MB",
            300,
            at_most=True,
        ),
        Metric(
            "peak memory above the bare loop's, previews and export included",
            statistics.median(a["peak_with_export_mb"] - b["peak_mb"] for a, b in pairs),
            "MB",
            300,
            at_most=True,
        ),
    ]


def measure_latents(config: BenchmarkConfig) -> list[Metric]:
    """Measure the milliseconds to read batches, with flips, from a latent cache: the best of 200 on one core.

    The larger batch is measured with the noise that a training step draws for it.
    """
    import torch

    from training.core.batches import fetch
    from training.core.draws import NEWEST, SampleKey, draws_class
    from training.data.latent_cache.dataset import LatentCache

    torch.set_num_threads(1)
    write_recipe(config)
    cache = LatentCache(str(Path(config.work_dir).resolve() / "latents"))
    dataset = cache.split("train", random_flip=True)

    def milliseconds(size: int, names: Sequence[str]) -> float:
        keys = [SampleKey(i % len(dataset), i) for i in range(size)]

        def assemble() -> None:
            fetch(dataset, keys)
            draws = draws_class(NEWEST)(0, 0, range(size))
            for name in names:
                draws.normal(name, cache.latent_shape)

        return 1000 * min(timeit.repeat(assemble, number=1, repeat=200))

    shape = "×".join(map(str, cache.latent_shape))
    return [
        Metric("latent cache: a batch of 32", milliseconds(32, ()), "ms", 1, at_most=True),
        Metric(
            f"latent cache: 1,024 latents of {shape}, with their noise",
            milliseconds(1024, ("posterior", "noise")),
            "ms",
            12,
            at_most=True,
        ),
    ]


def measure_commands(config: BenchmarkConfig) -> list[Metric]:
    """Measure the seconds that `--help` and a config error take."""
    metrics = []
    for trainer in TRAINERS:
        for name, words, status in (("--help", ["--help"], 0), ("a config error", ["--learning_rat", "1"], 2)):
            command = [sys.executable, f"training/{trainer}.py", *words]
            busy = child_cpu_seconds()
            seconds = statistics.median(timed(command, status) for _ in range(REPETITIONS))
            busy = (child_cpu_seconds() - busy) / REPETITIONS
            metrics.append(Metric(f"{trainer}.py, {name}", seconds, "s", 2.5, at_most=True))
            metrics.append(Metric(f"{trainer}.py, {name}: CPU time", busy, "s"))
    return metrics


def measure_first_step(config: BenchmarkConfig) -> list[Metric]:
    """Measure the seconds from `accelerate launch` to the row of the first step in metrics.csv."""
    recipe = write_recipe(config)
    wall, busy = zip(*(_first_step(recipe) for _ in range(3)), strict=True)
    with_regression, _ = _first_step(recipe, "--caption_prior.hidden_size", "512")
    return [
        Metric("accelerate launch to the first step's end", statistics.median(wall), "s", 12, at_most=True),
        Metric("accelerate launch to the first step's end: CPU time", statistics.median(busy), "s"),
        Metric("accelerate launch to the first step's end, with a caption prior", with_regression, "s"),
    ]


def measure_posters(config: BenchmarkConfig) -> list[Metric]:
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


def measure_decoder(config: BenchmarkConfig) -> list[Metric]:
    """Measure the memory of a training step of the poster decoder at its default size: the base, and per image."""
    peaks = []
    for batch_size in (0, 1, 2):
        peaks.append(_measured_by("decoder", f"--batch_size {batch_size}")["peak_mb"])
    return [
        Metric("poster decoder, 256 px, float32: model, gradients, optimizer", peaks[0], "MB"),
        Metric("poster decoder, 256 px, float32: each image of a batch", peaks[2] - peaks[1], "MB"),
    ]


def measure_captions(config: BenchmarkConfig) -> list[Metric]:
    """Measure caption generation with a cache against full forward passes, and the memory and speed of training."""
    results = _measured_by("captions", "--side generation --batch_size 8 --tokens 100")
    metrics = [
        Metric("captions, batch 8, 100 tokens: with the cache", results["cached_seconds"], "s"),
        Metric("captions, batch 8, 100 tokens: loop of full forwards", results["full_seconds"], "s"),
        Metric("captions: the cache's speed over the loop's", results["speedup"], "", 5),
        Metric("captions: share of tokens that are the same", results["equal_tokens"], "", 1),
    ]
    for preset, batch_sizes in CAPTION_BATCHES.items():
        for size in batch_sizes:
            results = _measured_by("captions", f"--side memory --preset {preset} --batch_size {size}")
            name = f"image_caption/{preset}.yaml, batch {size}"
            metrics.append(Metric(f"{name}: peak memory", results["peak_mb"], "MB"))
            if size:
                metrics.append(Metric(f"{name}: training", results["pairs_per_second"], "images/s"))
    return metrics


def _measured_by(script: str, words: str) -> dict[str, float]:
    """Run another script of this folder in a process of its own, and return what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "results.json")
        timed([sys.executable, f"training/benchmarks/{script}.py", *words.split(), "--output", str(output)])
        return json.loads(output.read_text(encoding="utf-8"))


MEASUREMENTS: dict[str, Callable[[BenchmarkConfig], list[Metric]]] = {
    "loop": measure_loop,
    "latents": measure_latents,
    "commands": measure_commands,
    "first_step": measure_first_step,
    "posters": measure_posters,
    "decoder": measure_decoder,
    "captions": measure_captions,
}


def write_recipe(config: BenchmarkConfig) -> Path:
    """Write the quickstart's config for the benchmark's own posters and latents, which are made if they are missing."""
    work = Path(config.work_dir).resolve()
    data, tokenizer, vae, latents = (work / name for name in ("posters", "tokenizer", "autoencoder", "latents"))
    _make(data, f"data_scripts/make_posters.py --output_dir {data} --num_posters {NUM_POSTERS} --resolution 64")
    _make(tokenizer, f"data_scripts/train_tokenizer.py --dataset_name {data} --output_dir {tokenizer}")
    _make(
        vae / "pipeline",
        f"training/train_autoencoder.py --config {QUICKSTART_AUTOENCODER} --dataset_name {data} --output_dir {vae} "
        "--max_train_steps 20 --report_to none --preview_epochs 0",
    )
    _make(
        latents / "cache.json",
        f"data_scripts/precompute_latents.py --dataset_name {data} --resolution 64 --vae {vae} --output_dir {latents}",
    )
    values = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    values.pop("prepare")
    paths = {"dataset_name": data, "tokenizer": tokenizer, "vae": vae, "latent_cache": latents}
    once = {"validation_epochs": 0, "preview_epochs": 0, "checkpointing_epochs": 0, "report_to": "none"}
    values |= {name: str(path) for name, path in paths.items()} | once
    values |= {"train_batch_size": 32, "ema_update_every": 1, "logging_steps": 10}
    # As in the bare loop, which has no caption prior and no mixed precision.
    values |= {"mixed_precision": "no", "caption_prior": {**values["caption_prior"], "hidden_size": 0}}
    recipe = work / "config.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe


def run_side(config: BenchmarkConfig, recipe: Path, side: str) -> dict[str, float]:
    """Run loops.py in a process of its own, and return what it measured."""
    threads = config.threads or usable_cores()
    with tempfile.TemporaryDirectory() as run:
        words = f"--recipe {recipe} --side {side} --steps {config.steps} --threads {threads} --run_dir {run}/run"
        return _measured_by("loops", words)


def timed(command: Sequence[str], status: int = 0) -> float:
    """Return the seconds that a command took. Raises UserError if its exit status differs from `status`."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=CODE, capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - started
    if done.returncode != status:
        raise UserError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-1500:]}")
    return seconds


def child_cpu_seconds() -> float:
    """Return the CPU time of all child processes that have ended; other work on the machine hardly changes it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make(path: Path, command: str) -> None:
    if not path.exists():
        print(f"making {path.name}: python {command}", flush=True)
        timed([sys.executable, *command.split()])


def _first_step(recipe: Path, *flags: str) -> tuple[float, float]:
    """Return the seconds until the first step is logged, and the CPU seconds of launcher and trainer."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        words = ["--config", str(recipe), "--output_dir", str(run), "--logging_steps", "1", *flags]
        command = [sys.executable, "-m", "accelerate.commands.launch", "training/train_latent_diffusion.py", *words]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=CODE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            while not (run / "metrics.csv").is_file():
                if process.poll() is not None or time.perf_counter() - started > FIRST_STEP_LIMIT:
                    raise UserError(f"the first step was not reached by: {' '.join(command)}; run it to see why")
                time.sleep(0.01)
            seconds = time.perf_counter() - started
            launcher = psutil.Process(process.pid)
            times = [p.cpu_times() for p in (launcher, *launcher.children(recursive=True))]
            return seconds, sum(t.user + t.system for t in times)
        finally:
            # End the launcher and the trainer at once: nothing that they would still save is needed.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def describe(metrics: Sequence[Metric]) -> dict[str, Any]:
    """Return the content of the JSON file: the metrics, and the machine they were measured on."""
    return {
        "cpu_cores": usable_cores(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "figures": [
            {"name": m.name, "value": round(m.value, 4), "unit": m.unit, "goal": m.goal, "met": m.met} for m in metrics
        ],
    }


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(BenchmarkConfig, argv, description=__doc__)
    metrics: list[Metric] = []
    for name in config.only:
        print(f"measuring: {name} ...", flush=True)
        measured = MEASUREMENTS[name](config)
        for metric in measured:
            print(metric.line(), flush=True)
        metrics += measured
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(describe(metrics), indent=2) + "\n")
    missed = sum(metric.met is False for metric in metrics)
    print(f"\n{missed} of {sum(m.goal is not None for m in metrics)} goals missed; results: {config.output}")


if __name__ == "__main__":
    entry_point(main)
