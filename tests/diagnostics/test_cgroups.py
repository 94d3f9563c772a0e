"""Limits of control groups, read from files laid out as on real systems."""

from __future__ import annotations

from pathlib import Path

from training.diagnostics.cgroups import cpu_limit, memory_limit


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="utf-8")
    return root


def test_a_container_with_version_2(tmp_path):
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/cpu.max": "150000 100000",
        "sys/fs/cgroup/memory.max": str(8 * 2**30),
    }
    root = lay_out(tmp_path, files)
    assert cpu_limit(root) == 1.5
    assert memory_limit(root) == 8 * 2**30


def test_the_tightest_of_the_nested_groups_counts(tmp_path):
    files = {
        "proc/self/cgroup": "0::/system.slice/job_7/step_0",
        "sys/fs/cgroup/system.slice/job_7/step_0/cpu.max": "max 100000",
        "sys/fs/cgroup/system.slice/job_7/cpu.max": "400000 100000",
        "sys/fs/cgroup/system.slice/cpu.max": "800000 100000",
        "sys/fs/cgroup/system.slice/job_7/step_0/memory.max": "max",
        "sys/fs/cgroup/system.slice/memory.max": str(2**30),
    }
    root = lay_out(tmp_path, files)
    assert cpu_limit(root) == 4
    assert memory_limit(root) == 2**30


def test_version_1_and_a_path_of_the_host(tmp_path):
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/docker/0f3a\n3:memory:/docker/0f3a\n1:name=systemd:/",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**31),
    }
    root = lay_out(tmp_path, files)
    assert cpu_limit(root) == 2
    assert memory_limit(root) == 2**31


def test_without_limits_or_control_groups(tmp_path):
    assert cpu_limit(tmp_path) is None
    assert memory_limit(tmp_path) is None
    files = {
        "proc/self/cgroup": "4:cpu:/\n3:memory:/",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    root = lay_out(tmp_path, files)
    assert cpu_limit(root) is None
    assert memory_limit(root) is None
