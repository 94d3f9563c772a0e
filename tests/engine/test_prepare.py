"""Missing inputs are made in order, by the project's own scripts, without the launcher's variables."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from pipelines.tools.cli import UserError
from tests.support.runs import ROOT, environment
from training.core.made_folders import incomplete, lock_of
from training.engine import prepare
from training.engine.run_config import RunConfig
from training.engine.signals import Interrupted


@dataclass
class LoopConfig(RunConfig):
    output_dir: str = ""
    dataset: str = ""


def nobody():
    return None


def posters(folder, number: int = 4) -> str:
    return f"data_scripts/make_posters.py --output_dir {folder} --num_posters {number} --num_workers 1"


def test_existing_inputs_are_unchanged_and_missing_ones_are_made(tmp_path, monkeypatch):
    there = tmp_path / "there"
    prepare.make_missing({str(there): posters(there)}, nobody)
    before = {file: file.stat().st_mtime_ns for file in there.rglob("*")}
    # With a launcher's variables, the script would wait for other ranks, which are never started.
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    recipes = {str(there): posters(there, number=-1), str(tmp_path / "new"): posters(tmp_path / "new")}
    prepare.make_missing(recipes, nobody)
    assert (tmp_path / "new/data").is_dir()
    assert {file: file.stat().st_mtime_ns for file in there.rglob("*")} == before


def test_a_mistake_in_a_recipe_is_a_user_error(tmp_path, capfd):
    with pytest.raises(UserError, match="could not be made; see the error above"):
        prepare.make_missing({str(tmp_path / "x"): posters(tmp_path / "x", number=-1)}, nobody)
    assert "error:" in capfd.readouterr().err


def test_a_recipe_that_makes_something_else(tmp_path):
    with pytest.raises(UserError, match=r"was not made \(exit status 0, but it is missing\)"):
        prepare.make_missing({str(tmp_path / "x"): posters(tmp_path / "y")}, nobody)


def test_without_arguments_the_command_for_own_images_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    monkeypatch.setattr(logging.getLogger("halftone"), "propagate", True)
    with caplog.at_level(logging.INFO, "halftone"):
        prepare.make_missing({str(tmp_path / "new"): posters(tmp_path / "new")}, nobody)
    assert "--train_data_dir FOLDER" in caplog.text
    assert "is missing; making it (1 of 1)" in caplog.text


def test_only_inputs_named_in_the_settings_are_made():
    recipes = {
        "data/posters": "data_scripts/make_posters.py --output_dir data/posters",
        "runs/reader/pipeline": "training/train_encoder.py --dataset_name data/posters --output_dir runs/reader",
        "data/others": "data_scripts/make_posters.py --output_dir data/others",
    }
    config = LoopConfig(output_dir="runs/x", prepare=recipes, dataset="data/others")
    assert list(config.recipes()) == ["data/others"]
    config.dataset = "runs/reader"  # a parent folder of an input; the posters that this input needs are made as well
    assert list(config.recipes()) == ["data/posters", "runs/reader/pipeline"]
    config.dataset = "data/post"
    assert config.recipes() == {}


def test_an_incomplete_input_is_made_again(tmp_path):
    made = tmp_path / "made"
    prepare.make_missing({str(made): posters(made)}, nobody)
    next((made / "data").glob("train-*")).write_bytes(b"")
    prepare.make_missing({str(made): posters(made)}, nobody)
    assert incomplete(made, "make_posters") is None
    assert (tmp_path / "made_old_1").is_dir()


@pytest.mark.parametrize("path", ["made", pytest.param("made/manifest.json", marks=pytest.mark.slow)])
def test_an_input_that_another_process_makes_is_waited_for_and_used(tmp_path, path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("halftone"), "propagate", True)
    words = posters(tmp_path / "made", 1500).split()
    other = subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=ROOT, env=environment())
    while not (tmp_path / ".writing-made").is_dir():
        assert other.poll() is None
        time.sleep(0.05)
    with caplog.at_level(logging.INFO, "halftone"):
        prepare.make_missing({str(tmp_path / path): posters(tmp_path / "made", 1500)}, nobody)
    assert other.wait() == 0
    assert "another process is making" in caplog.text
    assert "making it" not in caplog.text


def test_waiting_for_another_process_can_be_stopped(tmp_path):
    requests = iter([None, None, signal.SIGTERM])
    started = time.monotonic()
    with lock_of(tmp_path / "made"), pytest.raises(Interrupted):
        prepare.make_missing({str(tmp_path / "made"): posters(tmp_path / "made")}, lambda: next(requests))
    assert time.monotonic() - started < 5


def test_several_runs_at_once_make_an_input_once(tmp_path):
    code = "from training.engine.prepare import make_missing; import sys; make_missing({sys.argv[1]: sys.argv[2]}, int)"
    words = [sys.executable, "-c", code, str(tmp_path / "made"), posters(tmp_path / "made", 200)]
    runs = [
        subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(3)
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert sum("Wrote" in output for output in outputs) == 1
    assert incomplete(tmp_path / "made", "make_posters") is None


@pytest.mark.parametrize("command", ["data_scripts/make_posters.py --output_dir 'x", "", "  "])
def test_a_command_that_cannot_be_read(tmp_path, command):
    with pytest.raises(UserError, match="in `prepare` cannot be read"):
        prepare.make_missing({str(tmp_path / "x"): command}, nobody)
    with pytest.raises(UserError, match="in `prepare` cannot be read"):
        prepare.missing_inputs({str(tmp_path / "x"): command})
