"""The memory that this process uses, and errors that say that there is too little of it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tools.devices import peak_memory, reserved_memory

if TYPE_CHECKING:
    import torch

# What torch's allocators, oneDNN and the C++ library say; only that of CUDA has an exception of its own.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a GPU, a Mac or a CPU does not suffice."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def memory_mib(device: torch.device) -> float | None:
    """Return the memory in use in MiB: reserved by torch on a GPU, otherwise resident; None if it is unknown."""
    reserved = reserved_memory(device)
    if reserved is not None:
        return round(reserved / 2**20, 1)
    import psutil

    with contextlib.suppress(psutil.Error):
        return round(psutil.Process().memory_info().rss / 2**20, 1)
    return None


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory in MiB: on a GPU as `peak_memory` says, otherwise resident; None if unknown."""
    peak = peak_memory(device)
    if peak is not None:
        return round(peak / 2**20, 1)
    resident = peak_resident_bytes()
    return None if resident is None else round(resident / 2**20, 1)


def peak_resident_bytes(pid: int | None = None) -> int | None:
    """Return the most memory in bytes that a process has held at once.

    Args:
        pid: of another process than this one; its memory is known on Linux only.

    Returns:
        None if it is unknown.
    """
    with contextlib.suppress(OSError):
        # `ru_maxrss` includes the memory of the parent at the moment when it started the process; VmHWM does not.
        for line in Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if pid is not None:
        return None
    with contextlib.suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None
