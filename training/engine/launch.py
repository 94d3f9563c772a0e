"""Processes, devices, threads and precision: what must be settled before a model is built."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import yaml

from pipelines.tools.cli import UserError
from pipelines.tools.devices import computes_in_bf16, has_accelerator_device
from training.core.options import Options, option
from training.engine.signals import launcher_command

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

# Previews and exports keep one process busy while the others wait for it.
PROCESS_GROUP_TIMEOUT = timedelta(hours=6)


# Of mallopt(3): what may stay at the heap's end, and from what size a block is the system's own, never kept.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, LARGEST_KEPT_BLOCK = 2_000_000_000, 1_000_000_000


@dataclass
class LaunchConfig(Options):
    """Precision and threads of each process; the Accelerate config says the rest."""

    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = option(None, on_resume="warn")
    """Unset: what the Accelerate config says. auto: bf16 where the device has its arithmetic, else no."""
    cpu_threads: int = option(0, on_resume="free", at_least=0)
    """Threads on a CPU; 0 shares the machine's cores among its processes."""


def start_accelerator(config: LaunchConfig) -> Accelerator:
    """The Accelerator of this run, on the device and topology that the launcher gave.

    Raises:
        UserError: fp16 on a CPU, or a launcher that was asked for several processes and started one.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "auto":
        precision = "bf16" if computes_in_bf16() else "no"
    if precision == "fp16" and not has_accelerator_device():
        raise UserError(
            "--mixed_precision fp16 needs a GPU, and this run is on a CPU; take bf16 or no "
            "(flag --mixed_precision, or mixed_precision in the Accelerate config)"
        )
    accelerator = Accelerator(
        # Without being told so, Accelerate starts one process per rank, each on its own, under torchrun on CPUs.
        cpu=not has_accelerator_device(),
        mixed_precision=precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT),
            # Buffers are not broadcast: nothing here keeps running statistics that could differ between ranks.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    _check_world_size(accelerator.num_processes)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(config.cpu_threads or threads_per_process())
        keep_freed_memory()
        # For the captions of one batch its threads gain nothing, and they take turns with those that multiply.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on the main process; its result, or its UserError, reaches every process.

    Other exceptions end the main process, and the launcher the rest.
    """
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def threads_per_process() -> int:
    """This machine's usable cores shared out among its processes, unless the user's OMP_NUM_THREADS says otherwise.

    `accelerate launch` and torchrun set OMP_NUM_THREADS to 1, half the speed of a two-core machine: under a launcher
    a 1 is taken for theirs.
    """
    chosen = _as_int(os.environ.get("OMP_NUM_THREADS"))
    if chosen and not (chosen == 1 and launcher_command()):
        return chosen
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def keep_freed_memory() -> None:
    """Tell the C library's allocator to keep what is freed, where it is GNU's and the user has not told it otherwise.

    A step asks for the memory that the one before gave back. Handed to the system in between, it comes back page by
    page and zeroed: 25,000 page faults a step for the quickstart's U-Net, a tenth of its time.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory this process has had: on a GPU what torch allocated there, else resident; None if unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    with contextlib.suppress(ImportError):  # Windows
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    return None


def _check_world_size(came: int) -> None:
    """`accelerate launch --cpu --num_processes 2` and MULTI_CPU configs silently start one process."""
    for asked in (_asked_processes(launcher_command()), _as_int(os.environ.get("WORLD_SIZE"))):
        if asked is not None and asked != came:
            raise UserError(
                f"the launcher was asked for {asked} processes and started {came}; "
                f"on CPUs use: torchrun --nproc-per-node {asked} training/train_X.py …"
            )


def _asked_processes(command: list[str]) -> int | None:
    if not any("accelerate" in word for word in command[:6]):
        return None  # torchrun starts what it is asked for
    for position, word in enumerate(command):
        if word.startswith(("--num_processes=", "--num-processes=")):
            return _as_int(word.split("=", 1)[1])
        if word in ("--num_processes", "--num-processes") and position + 1 < len(command):
            return _as_int(command[position + 1])
    if "--config_file" in command[:-1]:
        path = Path(command[command.index("--config_file") + 1])
        if path.is_file():
            return _as_int((yaml.safe_load(path.read_text()) or {}).get("num_processes"))
    return None


def _as_int(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
