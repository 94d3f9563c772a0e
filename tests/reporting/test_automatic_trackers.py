"""`--report_to auto`: W&B where the user has set it up, otherwise the files of the run only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.runs import TOY

QUESTION = "from training.reporting.tracking import automatic_trackers; print(automatic_trackers())"


def environment(home: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def chosen(home: Path, folder: Path, **variables: str) -> str:
    """Return the trackers that a new process chooses, with `home` as the home folder and in the folder `folder`."""
    command = [sys.executable, "-c", QUESTION]
    done = subprocess.run(command, cwd=folder, env=environment(home, **variables), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def toy(home: Path, folder: Path, *flags: str, **variables: str) -> str:
    """Run two steps without --report_to, and return the output."""
    words = ("--output_dir", str(folder), "--max_train_steps", "2", "--cpu_threads", "1", *flags)
    command = [sys.executable, str(TOY), *words]
    done = subprocess.run(command, cwd=home, env=environment(home, **variables), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "[]"),
        ({"WANDB_API_KEY": "0" * 40}, "['wandb']"),
        ({"WANDB_MODE": "offline"}, "['wandb']"),
        ({"WANDB_MODE": "online"}, "['wandb']"),
        ({"WANDB_MODE": "disabled"}, "[]"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "0" * 40}, "[]"),
    ],
)
def test_the_environment(tmp_path, variables, expected):
    assert chosen(tmp_path, tmp_path, **variables) == expected


def test_no_service_of_wandb_is_left_where_it_is_not_used(tmp_path):
    children = "import psutil; print([p.name() for p in psutil.Process().children(recursive=True)])"
    command = [sys.executable, "-c", f"{QUESTION}; {children}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


@pytest.mark.parametrize("host", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_a_login(tmp_path, host):
    (tmp_path / ".netrc").write_text("machine huggingface.co login user password secret\n")
    assert chosen(tmp_path, tmp_path) == "[]"
    (tmp_path / ".netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert chosen(tmp_path, tmp_path) == "['wandb']"


def test_the_settings_of_a_folder(tmp_path):
    """`wandb offline` writes them."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert chosen(tmp_path, tmp_path) == "['wandb']"


def test_a_run_without_a_login_is_recorded_in_its_folder_only_and_says_so(tmp_path):
    output = toy(tmp_path, tmp_path / "run")
    (line,) = [line for line in output.splitlines() if "report_to" in line]
    assert line.startswith("--report_to auto: W&B has no login, no key and no WANDB_MODE here")
    assert "--report_to tensorboard" in line
    assert not (tmp_path / "run" / "wandb").exists()
    assert not (tmp_path / "wandb").exists()
    assert "report_to: none" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
def test_a_run_with_a_mode_is_recorded(tmp_path):
    output = toy(tmp_path, tmp_path / "run", WANDB_MODE="offline")
    assert "--report_to auto: wandb records the run" in output
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert "report_to: wandb" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
def test_wandb_by_name_still_records_offline_without_a_login(tmp_path):
    output = toy(tmp_path, tmp_path / "run", "--report_to", "wandb")
    assert "recording offline" in output
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_settings_that_wandb_refuses_do_not_end_the_run(tmp_path):
    output = toy(tmp_path, tmp_path / "run", WANDB_MODE="sometimes")
    assert "wandb could not be started and will not record this session" in output
    assert (tmp_path / "run" / "record.json").is_file()
