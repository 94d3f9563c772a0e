"""A Slurm that all tests of this folder share, and a folder that they submit from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.scripts.conftest import COMMON, TINY_AUTOENCODER, posters  # noqa: F401 - a fixture
from tests.support.runs import ROOT, environment
from tests.support.slurm import Slurm, missing_for_slurm, running_slurm

SITE = {"gpus_per_node": 0, "cpus_per_process": 1, "time": "00:10:00", "warning_seconds": 60}


class Cluster:
    """Submits to a real Slurm as a user does, from a folder of its own."""

    def __init__(self, slurm: Slurm, folder: Path):
        self.slurm, self.folder = slurm, folder
        (folder / "site.yaml").write_text(yaml.safe_dump(SITE))
        (folder / "training").symlink_to(ROOT / "training")
        (folder / "data_scripts").symlink_to(ROOT / "data_scripts")

    @property
    def environment(self) -> dict[str, str]:
        python = f"{Path(sys.executable).parent}:{self.slurm.environment['PATH']}"
        site = {"HALFTONE_SITE": "site.yaml", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return environment(**{**self.slurm.environment, **site, "PATH": python})

    def run(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=self.folder, env=self.environment, input=stdin, capture_output=True, text=True, timeout=500
        )

    def submit(self, *words: str) -> dict[str, str]:
        """Run submit.py, and return the ids of the jobs by their names."""
        done = self.run(sys.executable, "training/hpc/submit.py", *words)
        assert done.returncode == 0, done.stderr
        lines = [line.split(": job ") for line in done.stdout.splitlines()]
        return {name: rest.split(";")[0].split(",")[0] for name, rest in lines}

    def output(self) -> str:
        files = sorted((self.folder / "runs/hpc").glob("*.out"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in files)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    if missing := missing_for_slurm():
        pytest.skip(missing)
    with running_slurm(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def cluster(slurm, tmp_path) -> Cluster:
    return Cluster(slurm, tmp_path)


@pytest.fixture(scope="session")
def training_flags(posters) -> tuple[str, ...]:  # noqa: F811 - the fixture
    """Flags of a tiny autoencoder, whose run takes a few seconds."""
    quiet = ("--preview_epochs", "0", "--validation_epochs", "0", "--checkpointing_epochs", "0")
    return (*COMMON, *TINY_AUTOENCODER, *quiet, "--dataset_name", os.fspath(posters))
