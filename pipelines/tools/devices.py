"""Select the device that a command runs on, for training, sampling, evaluation and data preparation."""

from __future__ import annotations

import os
import timeit
from typing import TYPE_CHECKING

from .cli import UserError, one_line

if TYPE_CHECKING:
    import torch

PROBES = 7
DEVICE_HELP = "Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"
"""The `--help` text of `--device`, in every command that has the option."""


def get_device(name: str | None = None, local_rank: int | None = None) -> torch.device:
    """Return the device `name`, or by default the GPU if there is one (CUDA or MPS) and otherwise the CPU.

    Set the environment variable ACCELERATE_USE_CPU to true to make the CPU the default on a machine with a GPU.

    Args:
        name: The value of `--device`, such as cpu, cuda, cuda:1 or mps.
        local_rank: Rank of this process on its machine, for commands with several processes. Each process uses its own
            CUDA device unless `name` selects one.

    Raises:
        UserError: If this machine, or this build of torch, does not have the device.
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
    # torch raises these for a device that is unknown, missing, or not supported by its build.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({one_line(error, 200)}); name another, such as cpu, or leave it out"
        ) from error
    return device


def has_accelerator_device() -> bool:
    """Whether there is a GPU, and ACCELERATE_USE_CPU is not set to true."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes"):
        return False
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def bf16_is_faster(*, products: bool = False) -> bool:
    """Return whether bfloat16 is faster than float32 on the default device.

    On a CPU that takes matrix units (AMX). Those that only have the vector instructions of AVX-512 for it can be slower
    in bfloat16: the steps of a U-Net took 1.4 times as long on one of them. A network of large products of matrices
    is several times as fast with these instructions as well (docs/LOG.md).

    Args:
        products: whether the network consists of such products, as a transformer does.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    instructions = ["_is_amx_tile_supported", *(["_is_avx512_bf16_supported"] if products else [])]
    return not torch.backends.mps.is_available() and any(getattr(torch.cpu, name, bool)() for name in instructions)


def bf16_products_are_faster() -> bool:
    """Measure whether products of large matrices take at most half as long in bfloat16 as in float32 on the CPU.

    That decides about networks which consist of such products, transformers among them. On processors with bfloat16
    instructions they are 2 to 5 times as fast, although convolutions may be slower (see `bf16_is_faster`).
    """
    import torch

    def seconds(dtype: torch.dtype) -> float:
        inputs, weight = torch.ones(1024, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
        return min(timeit.repeat(lambda: torch.nn.functional.linear(inputs, weight), number=1, repeat=PROBES))

    return seconds(torch.bfloat16) <= seconds(torch.float32) / 2


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished its work, so that time measurements include it. No-op on the CPU."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def release_cached_memory(device: torch.device) -> None:
    """Give back to a GPU what torch keeps for later, in pieces that may be too small. No-op on the CPU."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def reserved_memory(device: torch.device) -> int | None:
    """Return the bytes that torch holds on a GPU, used or kept for later; None on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return torch.mps.driver_allocated_memory() if device.type == "mps" else None


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that tensors have taken on a GPU; None on the CPU.

    torch keeps no such record of the GPU of a Mac: it is what torch holds there now, which becomes smaller only if
    `release_cached_memory` is called, or if the memory becomes scarce.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return reserved_memory(device)
