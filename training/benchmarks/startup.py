"""Start-up: imports, `--help` and errors, the first step of a run, and loading a pipeline."""

from __future__ import annotations

import subprocess
import sys
import time

from pipelines.tools.cli import UserError
from pipelines.tools.resources import CODE
from training.benchmarks.children import child_cpu_seconds, timed
from training.benchmarks.inputs import BenchmarkConfig, Inputs
from training.benchmarks.launched import measure_start_of_run
from training.benchmarks.results import FIRST_STEP, Metric, spread

TRAINERS = ("train_latent_diffusion", "train_autoencoder")
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
    recipe = ["--config", str(inputs.recipe)]
    steps = [measure_start_of_run(recipe) for _ in range(times)]
    metrics.append(spread(FIRST_STEP, [step.seconds for step in steps], "s", 12, at_most=True))
    metrics.append(spread(f"{FIRST_STEP}: CPU time", [step.cpu_seconds for step in steps], "s"))
    if not config.quick:
        with_regression = measure_start_of_run([*recipe, "--caption_prior.hidden_size", "512"])
        metrics.append(Metric(f"{FIRST_STEP}, with a caption prior", with_regression.seconds, "s"))
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
