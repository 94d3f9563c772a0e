"""The memory that this process uses."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def memory_mib(device: torch.device) -> float | None:
    """Return the memory in use in MiB: reserved by torch on a GPU, otherwise resident; None if it is unknown."""
    if device.type == "cuda":
        import torch

        return round(torch.cuda.memory_reserved(device) / 2**20, 1)
    import psutil

    with contextlib.suppress(psutil.Error):
        return round(psutil.Process().memory_info().rss / 2**20, 1)
    return None


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory in MiB: allocated by torch on a GPU, otherwise resident; None if it is unknown."""
    if device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    with contextlib.suppress(ImportError):  # Windows
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    return None
