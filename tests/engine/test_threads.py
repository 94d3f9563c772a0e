"""One core for each thread, where a process uses all of them; looked up in /proc, as the system sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.runs import ROOT, environment

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores and Linux")

PROGRAM = """
import json, os, sys
import torch
from tests.support.toy import ToyConfig, ToyStage
from training.engine.launch import start_accelerator
from training.engine.loading import start_worker
from training.engine.threads import main_thread_on_its_core, usable_cores

def placed():
    masks = [sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")]
    return sorted(mask for mask in masks if len(mask) == 1)

def of_worker():
    reader, writer = os.pipe()
    if os.fork() == 0:
        start_worker(0, cores)
        os.write(writer, json.dumps(sorted(os.sched_getaffinity(0))).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(reader, 1000))

cores = usable_cores()
accelerator = start_accelerator(ToyConfig(cpu_threads=int(sys.argv[1])))
seen = {"threads": torch.get_num_threads(), "before": placed()}
with main_thread_on_its_core(accelerator.device):
    seen |= {"inside": placed(), "worker": of_worker()}
print(json.dumps(seen | {"after": placed(), "main": sorted(os.sched_getaffinity(0))}))
"""


def see(threads: int, **variables: str) -> dict:
    kept = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", PROGRAM, str(threads)]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_each_thread_has_a_core_of_its_own_while_training():
    seen = see(0)
    assert seen["threads"] == len(CORES)
    assert seen["before"] == seen["after"] == [[core] for core in CORES[1:]]
    assert seen["inside"] == [[core] for core in CORES]
    assert seen["main"] == seen["worker"] == CORES  # what is started later may use every core


@pytest.mark.parametrize("variables", [{"OMP_PROC_BIND": "false"}, {"LOCAL_WORLD_SIZE": "2"}])
def test_threads_are_left_alone_where_somebody_else_places_them(variables):
    seen = see(len(CORES), **variables)
    assert seen["threads"] == len(CORES)
    assert seen["inside"] == []


def test_fewer_threads_than_cores_are_left_alone():
    assert see(len(CORES) - 1)["inside"] == []
