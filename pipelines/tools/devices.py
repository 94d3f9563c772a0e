"""The device that a command runs on: one rule for training, sampling and evaluation."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .cli import UserError

if TYPE_CHECKING:
    import torch


def get_device() -> torch.device:
    """The GPU if there is one (CUDA or MPS), unless ACCELERATE_USE_CPU says otherwise; else the CPU."""
    import torch

    if not has_accelerator_device():
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "mps")


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


def move_to_device(pipeline: Any, name: str | None = None) -> Any:
    """`pipeline` on the device `name` (cpu, cuda, cuda:1, mps, ...), or on `get_device()` if it is None.

    Raises:
        UserError: this machine or this build of torch has no such device.
    """
    try:
        return pipeline.to(name or get_device())
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it does not have
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
