"""Whether a job is requeued: by the run folder, and not only by the status of its command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT, TOY, environment
from tests.support.toy_runs import EVERY_STEP, cut_after, run, run_of
from training.hpc import requeue
from training.hpc.requeue import is_complete, newest_checkpoint
from training.run.folder import RunFolder


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory, EVERY_STEP)


@pytest.fixture
def cut(tmp_path, complete) -> Path:
    """The run as it is after three of its six steps."""
    folder = Path(shutil.copytree(complete, tmp_path / "cut", symlinks=True))
    cut_after(folder, 3)
    return folder


def decided(tmp_path: Path, status: int, run: Path | str = "", before: str = "", job: str = "12_1") -> int:
    words = ["--status", str(status), "--run", str(run), "--before", before, "--job", job]
    return requeue.main([*words, "--log_dir", str(tmp_path / "logs")])


@pytest.mark.parametrize("status", [0, 2, 130])
def test_an_end_that_is_final_is_not_requeued(tmp_path, cut, status):
    assert decided(tmp_path, status, cut) == status


def test_an_interrupted_command_is_requeued(tmp_path, cut):
    assert decided(tmp_path, 75, cut, "step-00000003") == 75
    assert decided(tmp_path, 75) == 75  # a command without a run folder


def test_a_launcher_that_hides_the_status_makes_no_difference(tmp_path, cut, complete):
    """Status 1 is that of `accelerate launch`, 143 that of a SIGTERM, 137 that of a lack of memory."""
    for status in (1, 143, 137):
        assert decided(tmp_path, status, cut, "step-00000002") == 75
        assert decided(tmp_path, status, cut) == 75
        assert decided(tmp_path, status, cut, "step-00000003") == status, "no progress: it would fail again"
        assert decided(tmp_path, status, complete, "step-00000002") == status, "all of the training is done"
        assert decided(tmp_path, status, tmp_path / "nothing") == status


def test_a_complete_run_is_recognized_by_its_folder(tmp_path, complete, cut):
    assert is_complete(RunFolder(complete))
    assert not is_complete(RunFolder(cut))
    assert newest_checkpoint(RunFolder(cut)) == "step-00000003"
    assert not is_complete(RunFolder(tmp_path / "nothing"))
    longer = Path(shutil.copytree(complete, tmp_path / "longer", symlinks=True))
    assert run(longer, "--extra_epochs", "1", "--signal_step", "8", *EVERY_STEP) == 75
    assert not is_complete(RunFolder(longer)), "the record is that of the first epoch"


def test_a_job_that_never_gets_anywhere_is_given_up(tmp_path, cut, capsys):
    for _ in range(requeue.MOST_WITHOUT_PROGRESS):
        assert decided(tmp_path, 75, cut, "step-00000003") == 75
    assert decided(tmp_path, 75, cut, "step-00000003", job="12_2") == 75, "another task has a count of its own"
    capsys.readouterr()
    assert decided(tmp_path, 75, cut, "step-00000003") == 1
    assert "requeued 10 times without a new checkpoint" in capsys.readouterr().err
    assert decided(tmp_path, 75, cut, "step-00000002") == 75, "there is progress again"
    assert decided(tmp_path, 75, cut, "step-00000003") == 75


@pytest.mark.slow
def test_a_run_under_accelerate_launch(tmp_path):
    """The launcher's status is always 1; a stopped run has a new checkpoint, and one with broken data gets nowhere."""
    assert launched(tmp_path, "stopped", "--signal_step", "3") == 1
    assert decided(tmp_path, 1, tmp_path / "stopped") == 75
    assert launched(tmp_path, "broken", "--broken_row", "5") == 1
    saved = newest_checkpoint(RunFolder(tmp_path / "broken"))
    assert decided(tmp_path, 1, tmp_path / "broken") == 75, "its steps were saved, and a file system may have failed"
    assert launched(tmp_path, "broken", "--broken_row", "5") == 1
    assert decided(tmp_path, 1, tmp_path / "broken", saved) == 1, "the same image again"


def launched(folder: Path, run: str, *flags: str) -> int:
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    words = [accelerate, "launch", "--cpu", str(TOY), "--output_dir", run, "--report_to", "none", "--cpu_threads", "1"]
    quiet = ("--checkpointing_epochs", "0", "--preview_epochs", "0", "--train_batch_size", "4")
    return subprocess.run([*words, *quiet, *flags], cwd=folder, env=environment(PYTHONPATH=str(ROOT))).returncode


def test_the_count_is_kept_beside_the_output_of_the_job(tmp_path, cut):
    assert decided(tmp_path, 75, cut, "step-00000003") == 75
    assert json.loads((tmp_path / "logs/12_1.requeued.json").read_text())["without_progress"] == 1
