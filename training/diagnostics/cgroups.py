"""The limits of the control groups (containers, jobs of a scheduler, services) that this process belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

# A value near 2**63 is how version 1 writes that memory is not limited.
UNLIMITED_BYTES = 2**60


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Return the number of cores whose time the control groups allow; None without a limit.

    Args:
        root: folder in which `proc` and `sys` are found.
    """
    limits = []
    for folder in _folders("cpu", root):
        quota, period = (_read(folder / "cpu.max").split() + ["", ""])[:2]
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the number of bytes of memory that the control groups allow; None without a limit."""
    limits = []
    for folder in _folders("memory", root):
        text = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if text.isdecimal() and int(text) < UNLIMITED_BYTES:
            limits.append(int(text))
    return min(limits, default=None)


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's group and of those around it, in both versions of control groups.

    Inside a container, the path of the group may be that of the host; the folder of the container is then the topmost.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _read(file: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8").strip()
    return ""
