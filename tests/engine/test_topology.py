"""The same run on different numbers of processes, and exact resuming on several: real processes under torchrun."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import forget_accelerate
from tests.support.runs import ROOT, TOY, assert_same_state, command, environment, relative_difference, toy
from tests.support.toy import main as toy_main

pytestmark = pytest.mark.slow

# Twenty steps of eight samples, with both phases; 56 samples make seven steps per epoch. Dropout is off, as its
# random numbers are drawn per micro-batch, and so depend on the split.
TWENTY = (
    "--critic", "true", "--dropout", "0", "--num_samples", "56", "--max_train_steps", "20", "--learning_rate", "1e-3",
    "--lr_warmup_steps", "5", "--preview_epochs", "0", "--checkpointing_epochs", "0", "--validation_epochs", "1",
)  # fmt: skip
LIMITS = {"true": 1e-10, "false": 1e-3}  # by --double
SPLITS = {
    "1×8": (1, 8, 1),
    "2×4": (2, 4, 1),
    "half the batch, twice the accumulation": (1, 4, 2),
    "2×2, accumulation 2": (2, 2, 2),
    "4×2": (4, 2, 1),
}


def train(folder: Path, name: str, double: str, *flags: str) -> None:
    processes, batch, accumulation = SPLITS[name]
    shape = ("--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation), "--double", double)
    start(folder, *TWENTY, *shape, *flags, processes=processes)


def start(folder: Path, *flags: str, processes: int) -> None:
    """Run with torchrun, or, for a single process, in this process, which saves the time for starting one."""
    if processes > 1:
        toy(folder, *flags, processes=processes)
        return
    forget_accelerate()
    assert toy_main(["--output_dir", str(folder), "--report_to", "none", "--cpu_threads", "1", *flags]) == 0


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for double in LIMITS:
        folders[double] = tmp_path_factory.mktemp("reference") / double
        train(folders[double], "1×8", double)
    return folders


@pytest.mark.parametrize(
    ("name", "double"), [*((name, "true") for name in SPLITS if name != "1×8"), ("2×4", "false"), ("4×2", "false")]
)
def test_any_split_of_a_global_batch_trains_the_same_model(tmp_path, reference, name, double):
    train(tmp_path / "run", name, double)
    for files in ("phase_denoiser.safetensors", "phase_critic.safetensors", "ema.safetensors"):
        difference = relative_difference(tmp_path / "run", reference[double], [files])
        print(f"{name}, double {double}, {files}: {difference:.2e}")
        assert difference <= LIMITS[double], files


def test_another_seed_exceeds_the_limits(tmp_path, reference):
    """The limits are strict enough: with another order of samples, the difference is far larger."""
    train(tmp_path / "run", "1×8", "false", "--seed", "1")
    assert relative_difference(tmp_path / "run", reference["false"]) > 1e-2


# Six steps per epoch for any number of processes.
INTERRUPTED = (
    "--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--logging_steps", "4", "--validation_steps", "5",
    "--critic", "true", "--lr_scheduler", "cosine", "--lr_warmup_steps", "3", "--num_train_epochs", "3",
    "--ema_update_every", "2", "--checkpointing_epochs", "0", "--preview_epochs", "0",
)  # fmt: skip


def flags_for(folder: Path, processes: int) -> list[str]:
    return [
        *("--output_dir", str(folder), "--report_to", "none", "--cpu_threads", "1"),
        *INTERRUPTED,
        *("--num_samples", str(24 * processes)),
    ]


def interrupt_at(folder: Path, step: int, processes: int) -> int:
    """Start the run, whose processes send themselves a SIGTERM during `step` (from 1); return the saved step."""
    flags = [*flags_for(folder, processes), "--signal_step", str(step)]
    if processes == 1:
        forget_accelerate()
        assert toy_main(flags) == 75
    else:
        done = subprocess.run(
            command(TOY, *flags, processes=processes),
            env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode != 0, done.stdout
        assert "everything is saved" in done.stdout, done.stderr
    return json.loads((folder / "checkpoints/latest/trainer_state.json").read_text())["step"]


@pytest.mark.parametrize("processes", [1, 2, pytest.param(3, marks=pytest.mark.long)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, processes):
    """Interrupted within an epoch and at the end of one, the run has bit-identical tensors and the same metrics."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(whole, *flags_for(whole, processes)[6:], processes=processes)
    assert interrupt_at(parts, 4, processes) == 4
    assert interrupt_at(parts, 12, processes) == 12
    start(parts, *flags_for(parts, processes)[6:], processes=processes)
    assert_same_state(parts, whole)


def test_balanced_samples_are_the_same_on_two_processes_and_after_a_resume(tmp_path, reference):
    """One row in eight is rare, and half of the draws are of rare rows, on any number of processes."""
    balanced = ("--balance_by", "kind")
    train(tmp_path / "one", "1×8", "true", *balanced)
    train(tmp_path / "two", "2×4", "true", *balanced)
    assert relative_difference(tmp_path / "two", tmp_path / "one") <= LIMITS["true"]
    assert relative_difference(tmp_path / "one", reference["true"]) > 1e-2
    forget_accelerate()
    shape = ("--train_batch_size", "8", "--double", "true", "--cpu_threads", "1", "--report_to", "none")
    flags = ["--output_dir", str(tmp_path / "parts"), *TWENTY, *shape, *balanced]
    assert toy_main([*flags, "--signal_step", "10"]) == 75
    forget_accelerate()
    assert toy_main(flags) == 0
    assert_same_state(tmp_path / "parts", tmp_path / "one")


def test_torchrun_passes_a_sigterm_on_and_everything_is_saved(tmp_path):
    """The signal is sent to torchrun only, at an arbitrary moment of training."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    toy(whole, *flags_for(whole, 2)[6:], processes=2)
    slow = [*flags_for(parts, 2), "--slow_seconds", "0.2"]
    process = subprocess.Popen(
        command(TOY, *slow, processes=2), env=environment(), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: (parts / "metrics.csv").is_file(), process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert "everything is saved" in output, errors
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(parts) in (p.info["cmdline"] or [])]
    toy(parts, *flags_for(parts, 2)[6:], processes=2)
    assert_same_state(parts, whole)


def test_a_stop_while_one_process_exports_ends_them_all(tmp_path):
    """Only the main process receives the signal, during `finish`: no other process may wait for it forever."""
    run = tmp_path / "run"
    flags = [*flags_for(run, 2), "--signal_at", "finish", "--signal_rank", "0"]
    done = subprocess.run(
        command(TOY, *flags, processes=2), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "everything is saved" in done.stdout, done.stderr
    assert not (run / "pipeline").exists()
    toy(run, *flags_for(run, 2)[6:], processes=2)
    assert (run / "pipeline/model_index.json").is_file()


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
