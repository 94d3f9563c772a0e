"""Estimates the electrical energy of a run from its time and the power of its devices."""

from __future__ import annotations

import subprocess
from typing import Any

WATTS_PER_CPU_CORE = 10.0  # servers and desktops are specified with 5 to 15 W per core
WATTS_PER_DEVICE = {"cuda": 300.0, "mps": 30.0}
QUERY = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]


def estimated_energy(device_type: str, devices: int, cpu_cores: int, seconds: float) -> dict[str, Any]:
    """Return the energy of `devices` at full power during the whole time, and what was assumed.

    It is a rough estimate: other parts of the machine and cooling are left out, and devices rarely take full power.

    Args:
        device_type: of torch, such as "cuda" or "cpu".
        devices: number of devices; for a CPU the number of processes, which has no influence.
        cpu_cores: number of cores of the machine.
    """
    if device_type == "cpu":
        watts, assumption = (
            WATTS_PER_CPU_CORE * cpu_cores,
            f"{WATTS_PER_CPU_CORE:g} W for each of {cpu_cores} CPU cores: an assumption",
        )
    else:
        limit = reported_power_limit() if device_type == "cuda" else None
        each = limit or WATTS_PER_DEVICE.get(device_type, WATTS_PER_DEVICE["cuda"])
        source = "its reported power limit" if limit else "an assumption"
        watts, assumption = each * devices, f"{each:g} W for each of {devices} devices: {source}"
    return {"kwh": watts * seconds / 3.6e6, "assumption": assumption}


def reported_power_limit() -> float | None:
    """Return the largest power limit in watts that the NVIDIA driver reports for a GPU; None if it reports none."""
    try:
        lines = subprocess.run(QUERY, capture_output=True, text=True, timeout=10).stdout.split()
        return max((float(line) for line in lines), default=None)
    except (OSError, subprocess.SubprocessError, ValueError):  # ValueError: "[N/A]"
        return None
