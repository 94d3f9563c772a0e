"""Short runs of tests/support/toy.py in the test's own process, and functions to inspect their folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.conftest import forget_accelerate
from tests.support.runs import rows
from tests.support.toy import main as toy_main
from training.core.layout import BatchLayout
from training.run.checkpoint import load_tensors

# 48 samples, and global batches of 8 (two micro-batches of 4): 6 steps per epoch.
LAYOUT = BatchLayout(4, gradient_accumulation_steps=2)
COMMON = (
    "--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--logging_steps", "1", "--num_train_epochs", "1",
    "--report_to", "none", "--cpu_threads", "1",
)  # fmt: skip
EVERY_STEP = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "50")


def run(folder: Path, *flags: str) -> int:
    forget_accelerate()
    return toy_main(["--output_dir", str(folder), *COMMON, *flags])


def run_of(tmp_path_factory: pytest.TempPathFactory, *sessions: Sequence[str], name: str = "run") -> Path:
    """Return the folder of a new run that was made in one or several sessions, each with its flags."""
    folder = tmp_path_factory.mktemp("runs") / name
    for flags in sessions:
        assert run(folder, *flags) == 0
    return folder


def at_step(folder: Path, step: int, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    return tensors_of(folder / "checkpoints" / f"step-{step:08d}", pattern)


def tensors_of(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    return {f"{f.name}:{k}": v for f in sorted(folder.glob(pattern)) for k, v in load_tensors(f).items()}


def state_of(folder: Path, name: str = "latest") -> dict:
    return json.loads((folder / "checkpoints" / name / "trainer_state.json").read_text())


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(folder) if row.get(name)]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def cut_after(folder: Path, step: int) -> None:
    """Delete the pipeline and all checkpoints after `step`, as if the run had been killed then."""
    for saved in (folder / "checkpoints").glob("step-*"):
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)
    shutil.rmtree(folder / "pipeline", ignore_errors=True)
