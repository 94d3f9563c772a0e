"""Launching runs as users do, and comparing their checkpoints and metrics."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.forks import ROOT, environment, warm_interpreter
from training.core.stage import Phase
from training.run.metrics_log import TIMING_COLUMNS

TOY = ROOT / "tests" / "support" / "toy.py"


def launch(script: Path, *flags: str, processes: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script, with torchrun for several processes, and capture the output as text."""
    if processes == 1:
        return warm_interpreter().run(script, *flags, cwd=cwd)
    words = command(script, *flags, processes=processes)
    return subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=cwd, timeout=600)


def command(script: Path, *flags: str, processes: int = 1) -> list[str]:
    if processes == 1:
        return [sys.executable, str(script), *flags]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, str(script), *flags]


def toy(output_dir: Path, *flags: str, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    done = launch(
        TOY, "--output_dir", str(output_dir), "--report_to", "none", "--cpu_threads", "1", *flags, processes=processes
    )
    if check and done.returncode != 0:
        raise AssertionError(f"toy run failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def tensors(run: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """Return every tensor of the run's latest checkpoint, by file and name."""
    folder = run / "checkpoints" / "latest"
    loaded = {}
    for file in sorted(folder.glob(pattern)):
        loaded |= {f"{file.name}:{name}": tensor for name, tensor in load_file(file).items()}
    return loaded


def assert_same_state(one: Path, other: Path) -> None:
    """Assert that weights, EMA weights and optimizer states are bit-identical, and metrics equal except for timings."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert a
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, e.g. {different[:3]}"
    assert rows(one) == rows(other)
    states = [json.loads((r / "checkpoints/latest/trainer_state.json").read_text()) for r in (one, other)]
    for state in states:
        for name in ("elapsed_seconds", "sessions", "tracker_id"):
            state.pop(name)
    assert states[0] == states[1]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert table
    return [{name: value for name, value in row.items() if name not in TIMING_COLUMNS} for row in table]


def relative_difference(one: Path, other: Path, files: Sequence[str] = ("phase_*.safetensors",)) -> float:
    """Return |a - b| / |b|, where the norms are over all weights."""
    a = {k: v for pattern in files for k, v in tensors(one, pattern).items()}
    b = {k: v for pattern in files for k, v in tensors(other, pattern).items()}
    assert a.keys() == b.keys()
    difference = sum((a[k].double() - b[k].double()).square().sum() for k in a) ** 0.5
    return float(difference / sum(b[k].double().square().sum() for k in b) ** 0.5)


@contextmanager
def sigterm_in_step(step: int, phase: type[Phase], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Context in which a training of this phase gets a SIGTERM in the forward pass of a step."""
    forward = phase.forward

    def signalled(self, batch, draws):
        if draws.step == step:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, batch, draws)

    with monkeypatch.context() as patched:
        patched.setattr(phase, "forward", signalled)
        yield
