"""Threads, processes and mistakes on the main process."""

from __future__ import annotations

import os

import pytest
import torch

from pipelines.cli import UserError
from training import launch
from training.launch import on_main, start_accelerator, threads_per_process
from training.run_config import RunConfig

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("omp", "launcher", "local_processes", "expected"),
    [
        (None, [], "1", CORES),
        ("3", [], "1", 3),
        ("1", [], "1", 1),  # the user's own
        ("1", ["accelerate", "launch"], "1", CORES),  # the launcher's
        ("3", ["accelerate", "launch"], "1", 3),
        (None, [], str(2 * CORES), 1),
    ],
)
def test_threads_share_the_machine(monkeypatch, omp, launcher, local_processes, expected):
    monkeypatch.setattr(launch, "launcher_command", lambda: launcher)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_processes)
    if omp is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert threads_per_process() == expected


def test_cpu_threads_are_set(threads):
    start_accelerator(RunConfig(cpu_threads=1))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    "command",
    [
        ["accelerate", "launch", "--cpu", "--num_processes", "2", "x.py"],
        ["accelerate", "launch", "--num_processes=2", "x.py"],
        ["accelerate", "launch", "--config_file", "FILE", "x.py"],
    ],
)
def test_fewer_processes_than_asked_for_are_an_error(monkeypatch, tmp_path, command):
    (tmp_path / "a.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    words = [str(tmp_path / "a.yaml") if word == "FILE" else word for word in command]
    monkeypatch.setattr(launch, "launcher_command", lambda: words)
    with pytest.raises(UserError, match=r"asked for 2 processes and started 1; .* torchrun --nproc-per-node 2"):
        start_accelerator(RunConfig())


def test_a_rank_that_trains_alone_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="asked for 2 processes and started 1"):
        launch._check_world_size(1)


def test_the_result_and_the_mistake_of_the_main_process():
    accelerator = start_accelerator(RunConfig())
    assert on_main(accelerator, lambda: 7) == 7

    def fail():
        raise UserError("so and so")

    with pytest.raises(UserError, match="so and so"):
        on_main(accelerator, fail)
