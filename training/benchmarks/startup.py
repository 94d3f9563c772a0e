"""Start-up: imports, `--help` and errors, the first step of a run, and loading a pipeline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from pipelines.tools.cli import UserError
from pipelines.tools.resources import CODE
from training.benchmarks.children import child_cpu_seconds, timed
from training.benchmarks.inputs import BenchmarkConfig, Inputs
from training.benchmarks.results import FIRST_STEP, Metric, spread

TRAINERS = ("train_latent_diffusion", "train_autoencoder")
FIRST_STEP_LIMIT = 120.0
"""Seconds to wait for the first step of a run before the benchmark fails."""
LOADS = """
import sys, time
from pipelines.latent_diffusion import LatentDiffusionPipeline
started = time.perf_counter()
LatentDiffusionPipeline.from_pretrained(sys.argv[1])
print(time.perf_counter() - started)
"""


def measure_start(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Measure the seconds that commands take before their work begins: wall time, and CPU time where it is known."""
    times, python = config.times(3), sys.executable
    metrics = _command("import of the trainer of latent diffusion", [python, "-c", _imports()], times)
    for trainer in TRAINERS[: 1 if config.quick else None]:
        script = f"training/{trainer}.py"
        metrics += _command(f"{trainer}.py, --help", [python, script, "--help"], times, goal=2.5)
        wrong = [python, script, "--learning_rat", "1"]
        if not config.quick:
            metrics += _command(f"{trainer}.py, a config error", wrong, times, goal=2.5, status=2)
    steps = [_first_step(str(inputs.recipe)) for _ in range(times)]
    metrics.append(spread(FIRST_STEP, [wall for wall, _ in steps], "s", 12, at_most=True))
    metrics.append(spread(f"{FIRST_STEP}: CPU time", [busy for _, busy in steps], "s"))
    if not config.quick:
        with_regression, _ = _first_step(str(inputs.recipe), "--caption_prior.hidden_size", "512")
        metrics.append(Metric(f"{FIRST_STEP}, with a caption prior", with_regression, "s"))
    return [*metrics, *_from_pretrained(inputs, times)]


def _imports() -> str:
    return "import training.train_latent_diffusion, diffusers, transformers, datasets"


def _command(name: str, command: list[str], times: int, goal: float | None = None, status: int = 0) -> list[Metric]:
    walls, busy = [], []
    for _ in range(times):
        before = child_cpu_seconds()
        walls.append(timed(command, status))
        busy.append(child_cpu_seconds() - before)
    return [spread(name, walls, "s", goal, at_most=True), spread(f"{name}: CPU time", busy, "s")]


def _from_pretrained(inputs: Inputs, times: int) -> list[Metric]:
    """Measure `from_pretrained` alone, and the whole process with the imports before it."""
    whole, alone = [], []
    for _ in range(times):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", LOADS, str(inputs.model)], cwd=CODE, capture_output=True, text=True
        )
        whole.append(time.perf_counter() - started)
        if done.returncode:
            raise UserError(f"{inputs.model} could not be loaded; delete it to make it again: {done.stderr[-1500:]}")
        alone.append(float(done.stdout.split()[-1]))
    return [
        spread("from_pretrained", alone, "s"),
        spread("from_pretrained, with the start of Python and imports", whole, "s"),
    ]


def _first_step(recipe: str, *flags: str) -> tuple[float, float]:
    """Return the seconds until the first step is logged, and the CPU seconds of launcher and trainer."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        words = ["--config", recipe, "--output_dir", str(run), "--logging_steps", "1", *flags]
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
