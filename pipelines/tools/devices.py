"""The device that a command runs on: one rule for training, sampling, evaluation and preparing data."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .cli import UserError, one_line

if TYPE_CHECKING:
    import torch

DEVICE_HELP = "Where models run: cpu, cuda, cuda:1, mps, ...; unset: the GPU if there is one, otherwise the CPU"
"""What `--help` says of `--device`, in every command that has the option."""


def get_device(name: str | None = None, local_rank: int | None = None) -> torch.device:
    """The device `name`, or for None the GPU if there is one (CUDA or MPS) and the CPU otherwise.

    The environment variable ACCELERATE_USE_CPU, set to true, makes the CPU the default on a machine with a GPU too.

    Args:
        name: cpu, cuda, cuda:1, mps, ...: the value of `--device`.
        local_rank: number of this process on its machine, for a command of several processes: each takes a CUDA device
            of its own where the name does not choose one.

    Raises:
        UserError: this machine, or this build of torch, has no such device.
    """
    import torch

    if name is not None:
        device = _named(name)
    elif has_accelerator_device():
        device = torch.device("cuda" if torch.cuda.is_available() else "mps")
    else:
        device = torch.device("cpu")
    if device.type == "cuda" and device.index is None and local_rank is not None:
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return device


def _named(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    # What torch raises for a device that it does not know, was not built for, or does not find.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({one_line(error, 200)}); name another, such as cpu, or leave it out"
        ) from error
    return device


def has_accelerator_device() -> bool:
    """Whether there is a GPU that may be used: ACCELERATE_USE_CPU set to true forbids it."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes"):
        return False
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def computes_in_bf16() -> bool:
    """Whether the device has bfloat16 arithmetic of its own; others emulate it, slower than float32."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return not torch.backends.mps.is_available() and any(getattr(torch.cpu, name, bool)() for name in tests)


def synchronize(device: torch.device) -> None:
    """Wait for the work that was handed to `device`, so that a clock read next measures it. A CPU has none waiting."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
