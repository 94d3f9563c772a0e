"""Training runs that are launched as users launch them, measured from outside, and then ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.tools.cli import UserError
from pipelines.tools.resources import CODE
from training.core.memory import peak_resident_bytes

TRAINER = "training/train_latent_diffusion.py"


@dataclass(frozen=True)
class Start:
    """The beginning of a run.

    Attributes:
        seconds: from the command to the first row of metrics.
        cpu_seconds: CPU time of the launcher and of all processes of the run up to then.
        peak_mb: peak resident memory, in MB (10⁶ bytes), of the largest of these processes up to the last step; None
            where the system does not say it (other systems than Linux).
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float | None


def measure_start_of_run(
    words: Sequence[str], *, steps: int = 1, limit: float = 120.0, variables: Mapping[str, str] | None = None
) -> Start:
    """Launch a run of latent diffusion in a new output folder, and measure its first `steps` steps.

    Args:
        words: flags of the script, without --output_dir; every step has a row of metrics.
        limit: seconds to wait for the first step, and again for the last one, before the benchmark fails.
        variables: environment variables beside those of this process.

    Raises:
        UserError: the run ended, or did not reach the step in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        run, messages = Path(folder, "run"), Path(folder, "messages.txt")
        command = [sys.executable, "-m", "accelerate.commands.launch", TRAINER, *words]
        command += ["--output_dir", str(run), "--logging_steps", "1"]
        started = time.perf_counter()
        with _launched(command, variables or {}, messages) as process:
            try:
                _wait_for_step(1, run / "metrics.csv", process, limit)
                seconds = time.perf_counter() - started
                times = [p.cpu_times() for p in _processes(process)]
                _wait_for_step(steps, run / "metrics.csv", process, limit)
            except TimeoutError as error:
                said = messages.read_text(encoding="utf-8", errors="replace")[-1500:]
                raise UserError(f"{error} by: {' '.join(command)}: {said}") from None
            peaks = [peak_resident_bytes(p.pid) for p in _processes(process)]
    known = [peak / 1e6 for peak in peaks if peak is not None]
    return Start(seconds, sum(t.user + t.system for t in times), max(known, default=None))


@contextlib.contextmanager
def _launched(
    command: Sequence[str], variables: Mapping[str, str], messages: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Launch a command whose output goes to the file `messages`, and end all of its processes after the block."""
    environment = {**os.environ, **variables}
    with messages.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=CODE, stdout=output, stderr=output, start_new_session=True, env=environment
        )
    try:
        yield process
    finally:
        # End the launcher and the trainer at once: nothing that they would still save is needed.
        with contextlib.suppress(ProcessLookupError):  # they have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_step(step: int, metrics: Path, process: subprocess.Popen[bytes], limit: float) -> None:
    """Wait until metrics.csv has the row of a step, below its header.

    Raises:
        TimeoutError: the process ended before, or it takes longer than `limit` seconds.
    """
    deadline = time.perf_counter() + limit
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") <= step:
        if process.poll() is not None or time.perf_counter() > deadline:
            raise TimeoutError(f"{f'step {step}' if step > 1 else 'the first step'} was not reached")
        time.sleep(0.01)


def _processes(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    process = psutil.Process(launcher.pid)
    return [process, *process.children(recursive=True)]
