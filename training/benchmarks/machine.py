"""What a reader has to know about the machine of a measurement; neither its name nor any path on it."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from training.benchmarks.children import usable_cores

INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
}
"""Flags of /proc/cpuinfo that matter for networks, and the names of these instruction sets."""
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy")


def describe_machine(threads: int) -> dict[str, Any]:
    """Return processor, cores, instruction sets, memory, GPU, versions of libraries, and the threads of torch."""
    info = _processor_info()
    flags = info.get("flags", info.get("Features", "")).split()
    return {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "threads": threads,
        "instructions": [name for flag, name in INSTRUCTIONS.items() if flag in flags],
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def title(machine: dict[str, Any]) -> str:
    """Return the title of a machine, which is different for another number of threads."""
    parts = [machine["gpu"], machine["processor"], _number(machine["cores"], "core")]
    return ", ".join([*filter(None, parts), _number(machine["threads"], "thread")])


def details(machine: dict[str, Any]) -> str:
    """Return a sentence with what the title does not say."""
    sets = ", ".join(machine["instructions"]) or "unknown"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{machine['system']}; instruction sets: {sets}; {machine['memory_gb']:g} GB of memory; {versions}."


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _processor_info() -> dict[str, str]:
    """Return the entries of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _gpu() -> str | None:
    import torch

    from pipelines.tools.devices import get_device, has_accelerator_device

    if not has_accelerator_device():
        return None
    return torch.cuda.get_device_name() if get_device().type == "cuda" else "Apple GPU"
