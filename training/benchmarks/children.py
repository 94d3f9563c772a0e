"""Processes of the benchmark: each measurement runs in one of its own, so that none changes the threads, the memory or
the caches of another."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import ParamSpec, TypeVar

from pipelines.tools.cli import UserError
from pipelines.tools.resources import CODE
from training.core.memory import peak_resident_bytes

P = ParamSpec("P")
R = TypeVar("R")
PRELOADED = "training.benchmarks.preloaded"


def in_child(quick: bool, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function of a module in a process of its own, and return its result.

    Args:
        quick: fork the process from one that has imported torch and Diffusers, instead of starting an interpreter. It
            takes less time, but the memory of the process then includes imports that it does not need.

    Raises:
        UserError: the function raised it, or the process was killed.
    """
    context = multiprocessing.get_context("forkserver" if quick else "spawn")
    if quick:
        context.set_forkserver_preload([PRELOADED])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(
                _in_code_folder, functools.partial(function, *args, **kwargs), multiprocessing.get_start_method()
            ).result()
    except BrokenProcessPool:
        raise UserError(
            f"the process of {function.__name__} was killed; free memory for it, or leave this part out with --only"
        ) from None


def _in_code_folder(function: Callable[[], R], start_method: str) -> R:
    """Call the function in the folder from which scripts are started, without the messages of training."""
    # This process would start loader workers in the way in which it was started itself, which takes seconds.
    multiprocessing.set_start_method(start_method, force=True)
    os.chdir(CODE)
    with contextlib.redirect_stdout(sys.stderr), open(os.devnull, "w", encoding="utf-8") as silent:
        kept = os.dup(2)
        os.dup2(silent.fileno(), 2)
        try:
            return function()
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def run_scripts(commands: Sequence[Sequence[str]]) -> None:
    """Run scripts one after the other in this process, which imports torch and Diffusers only once.

    Raises:
        UserError: a script ended with another status than 0.
    """
    for script, *words in commands:
        sys.argv = [script, *words]
        try:
            runpy.run_path(str(CODE / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise UserError(
                    f"python {' '.join(sys.argv)} ended with status {end.code}; run it to see why"
                ) from None


def timed(command: Sequence[str], status: int = 0) -> float:
    """Return the seconds that a command took. Raises UserError if its exit status differs from `status`."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=CODE, capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - started
    if done.returncode != status:
        raise UserError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-1500:]}")
    return seconds


def measured_by(script: str, words: str) -> dict[str, float]:
    """Run another script of this folder in a process of its own, and return what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "results.json")
        timed([sys.executable, f"training/benchmarks/{script}.py", *words.split(), "--output", str(output)])
        return json.loads(output.read_text(encoding="utf-8"))


def child_cpu_seconds() -> float:
    """Return the CPU time of all child processes that have ended; other work on the machine hardly changes it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_mb() -> float:
    """Return the peak resident memory of this process in MB (10⁶ bytes); NaN where it is unknown."""
    return (peak_resident_bytes() or math.nan) / 1e6
