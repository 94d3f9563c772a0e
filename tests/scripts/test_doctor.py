"""`make doctor` in real processes: on this machine as it is, and in environments where something is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.environments import environment_of
from tests.support.hub_server import WRITE_TOKEN, HubServer
from tests.support.runs import environment

TOKEN = "hf_" + "Qz7" * 12
KEY = "0123456789abcdef" * 2 + "01234567"
NOT_KEPT = ("HF_TOKEN", "WANDB_API_KEY", "WANDB_MODE")
EVERY_STATE = {"ok", "warning", "missing", "optional"}


class Diagnosis:
    """The output of doctor.py in another process, and the rows of its table."""

    def __init__(self, folder: Path, python: str = sys.executable, **variables: str):
        folder.mkdir(parents=True, exist_ok=True)
        command = [python, str(ROOT / "training/doctor.py"), "--output", "doctor.json"]
        kept = {name: value for name, value in environment().items() if name not in NOT_KEPT}
        alone = {"NETRC": str(folder / "netrc"), "WANDB_CONFIG_DIR": str(folder / "wandb"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=folder, env={**kept, **alone, **variables}, capture_output=True, text=True, timeout=300
        )
        self.status, self.lines, self.errors = done.returncode, done.stdout.splitlines(), done.stderr
        self.file = (folder / "doctor.json").read_text(encoding="utf-8")
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in json.loads(self.file)["checks"]}

    def __getitem__(self, name: str) -> tuple[str, str, str]:
        row = self.rows[name]
        return row["state"], row["value"], row["advice"]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Diagnosis:
    """With everything: a scheduler in PATH, caches that can be written, and a Hub that accepts the token."""
    folder = tmp_path_factory.mktemp("healthy")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "sbatch").symlink_to("/bin/true")
    hub = HubServer(folder / "hub")
    variables = {**hub.env(WRITE_TOKEN, folder / "cache"), "PATH": f"{programs}:{os.environ['PATH']}"}
    yield Diagnosis(folder / "work", **variables, HF_DATASETS_CACHE=str(folder / "datasets"), WANDB_MODE="offline")
    hub.stop()


@pytest.fixture(scope="module")
def unhealthy(tmp_path_factory) -> Diagnosis:
    """An empty PATH, caches that cannot be written, keys in variables, and a Hub that accepts connections only."""
    folder = tmp_path_factory.mktemp("unhealthy")
    (folder / "file").write_text("a file where a folder is expected")
    (folder / "empty").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield Diagnosis(
            folder / "work",
            PATH=str(folder / "empty"),
            HF_HOME=str(folder / "file" / "cache"),
            HF_HUB_CACHE=str(folder / "file" / "hub"),
            HF_DATASETS_CACHE=str(folder / "file" / "datasets"),
            HF_TOKEN=TOKEN,
            WANDB_API_KEY=KEY,
            HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}",
            HF_HUB_OFFLINE="0",
        )


def test_nothing_is_missing_here(healthy):
    assert healthy.status == 0, healthy.lines
    assert json.loads(healthy.file)["missing"] == []
    assert "Nothing is missing that every run needs." in healthy.lines
    assert {row["state"] for row in healthy.rows.values()} <= EVERY_STATE
    for name in ("Python", "torch", "diffusers", "datasets", "huggingface_hub", "wandb", "memory", "working folder"):
        assert name in healthy.rows
    assert healthy["torch"] == ("ok", importlib.metadata.version("torch"), "")


def test_the_table_has_one_line_for_each_row(healthy):
    for name, row in healthy.rows.items():
        texts = [text for text in (row["value"], row["advice"]) if text]
        expected = f"  {row['state']:<8}  {name:<19}  {'  → '.join(texts)}"
        assert healthy.lines.count(expected) == 1, expected


def test_the_scheduler_and_the_trackers_are_found(healthy):
    assert healthy["scheduler"] == ("ok", "Slurm (sbatch)", "")
    assert healthy["tracker tensorboard"][0] == "ok"
    assert healthy["tracker wandb"] == ("ok", "WANDB_MODE is offline", "")


def test_the_hub_accepts_the_token_and_nobody_is_named(healthy):
    assert healthy["Hub token"] == ("ok", "in HF_TOKEN", "")
    state, value, _ = healthy["Hub"]
    assert state == "ok"
    assert value.endswith("accepts the token (role: write)")
    assert "ada" not in value.split()


@pytest.mark.slow
def test_folders_that_cannot_be_written_are_missing(unhealthy):
    assert unhealthy.status == 1
    for name, variable in (("cache of datasets", "HF_DATASETS_CACHE"), ("cache of the Hub", "HF_HUB_CACHE")):
        state, value, advice = unhealthy[name]
        assert state == "missing"
        assert "cannot be written (Not a directory)" in value
        assert variable in advice
    assert json.loads(unhealthy.file)["missing"] == ["cache of datasets", "cache of the Hub"]


@pytest.mark.slow
def test_an_empty_path_costs_only_what_needs_a_program(unhealthy):
    assert unhealthy["scheduler"][0] == "optional"
    assert unhealthy["C++ compiler"][0] == "optional"
    assert "--compile" in unhealthy["C++ compiler"][2]


@pytest.mark.slow
def test_a_silent_hub_is_a_warning_and_is_not_waited_for(unhealthy):
    state, value, advice = unhealthy["Hub"]
    assert state == "warning"
    assert "no answer for 5 seconds" in value
    assert "HF_HUB_OFFLINE=1" in advice


@pytest.mark.slow
def test_tokens_and_keys_are_found_but_never_shown(unhealthy):
    assert unhealthy["Hub token"] == ("ok", "in HF_TOKEN", "")
    assert unhealthy["tracker wandb"] == ("ok", "a key or a login was found", "")
    for text in (*unhealthy.lines, unhealthy.errors, unhealthy.file):
        assert TOKEN not in text
        assert KEY not in text


def test_wrong_versions_and_broken_packages(tmp_path):
    """An environment where most packages are absent, one is too old, one is too new, and one ends Python."""
    python = environment_of(tmp_path / "venv", "packaging", "psutil", "pyyaml")
    site_packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    for name, version, code in (
        ("sacrebleu", "1.4", ""),
        ("tqdm", "99.0", ""),
        ("jinja2", "3.1.6", "import os; os._exit(9)"),
        ("wandb", "0.24.2", ""),
        ("safetensors", "0.6.2", "raise ImportError('undefined symbol')"),
    ):
        (site_packages / name).mkdir()
        (site_packages / name / "__init__.py").write_text(code + "\n")
        (site_packages / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (site_packages / f"{name}-{version}.dist-info/METADATA").write_text(metadata)
    found = Diagnosis(tmp_path / "work", python)
    assert found.status == 1, found.errors
    state, value, advice = found["torch"]
    assert (state, advice.startswith("pip install 'torch")) == ("missing", True)
    assert "not installed" in value
    assert found["device"] == ("warning", "not checked, because torch is not installed", "")
    assert found["sacrebleu"][:2] == ("missing", "1.4 is too old (>=2.5,<3 is required)")
    assert found["wandb"][0] == "missing"
    assert found["tqdm"][:2] == ("warning", "99.0 is newer than what was tested (>=4.66,<5)")
    assert found["jinja2"][:2] == ("missing", "3.1.6 cannot be imported (it ends Python with status 9)")
    assert "ImportError: undefined symbol" in found["safetensors"][1]
    assert found["psutil"][0] == found["pyyaml"][0] == "ok"
    assert any(line.startswith("Missing: ") and "jinja2" in line for line in found.lines)


def test_an_output_that_cannot_be_written_is_one_message(tmp_path):
    command = [sys.executable, str(ROOT / "training/doctor.py"), "--output", str(tmp_path / "nowhere/doctor.json")]
    done = subprocess.run(command, env=environment(HF_HUB_OFFLINE="1"), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "--output" in done.stderr
