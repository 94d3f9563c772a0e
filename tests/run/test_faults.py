"""Full disks, deleted folders and readers that are gone, in real processes: training goes on, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.tools.cli import UserError
from tests.support.child import Child, in_child, send_output_to, wait_until
from tests.support.runs import ROOT, TOY, assert_same_state, environment, rows, tensors
from tests.support.toy_runs import assert_equal, run, run_of
from training.run.folder import RunFolder

# Two epochs of six steps, of about a fifth of a second, so that there is time to break something.
FLAGS = ("--num_train_epochs", "2", "--checkpointing_steps", "3", "--logging_steps", "1")
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
SLOW = ("--slow_seconds", "0.06")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory, FLAGS)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs the right to mount")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Fill the disk to the last byte inside the block."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    try:
        yield
    finally:
        filler.unlink()


def saved_step(folder: Path) -> int:
    state = folder / "checkpoints/latest/trainer_state.json"
    return json.loads(state.read_text())["step"] if state.is_file() else 0


def start(folder: Path, *flags: str) -> Child:
    return Child(lambda: run(folder, *FLAGS, *flags), folder.parent / "output.txt")


def until(child: Child, condition: Callable[[], bool]) -> None:
    wait_until(lambda: condition() or child.has_ended())


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_nothing(small_disk, whole, tmp_path):
    """Rows of metrics wait in memory; log, curves, samples, checkpoints and links fail with one message each."""
    folder = small_disk / "run"
    child = Child(lambda: run(folder, *FLAGS, *SLOW), tmp_path / "output.txt")
    until(child, lambda: saved_step(folder) == 3)
    with full(small_disk):
        until(child, lambda: "checkpoint of step 6 could not be written" in child.text())
        assert saved_step(folder) == 3
    assert child.wait() == 0, child.text()
    assert child.text().count("metrics.csv could not be written (No space left on device); training continues") == 1
    assert "metrics.csv can be written again" in child.text()
    assert_same_state(folder, whole)
    assert [row["step"] for row in rows(folder)] == [str(step) for step in range(1, 13)]
    assert "step 6 could not be written" in (folder / "run.log").read_text()  # its lines waited as well


@pytest.mark.slow
def test_a_full_disk_at_the_export_is_an_error_that_the_same_command_makes_up_for(small_disk, whole, tmp_path):
    folder = small_disk / "run"
    child = Child(lambda: run_and_report(folder, *FLAGS, *SLOW), tmp_path / "output.txt")
    until(child, lambda: saved_step(folder) == 12)
    with full(small_disk):
        assert child.wait() == 2, child.text()
    assert "the pipeline could not be exported" in child.text()
    assert "the checkpoint of step 12 is saved" in child.text()
    assert "Traceback" not in child.text()
    assert not (folder / "record.json").exists()
    assert run(folder, *FLAGS) == 0
    assert (folder / "pipeline/model_index.json").is_file()
    assert_equal(tensors(folder), tensors(whole))


def run_and_report(folder: Path, *flags: str) -> int:
    """Run as a command does: a UserError is one message and exit status 2."""
    from pipelines.tools.cli import entry_point

    entry_point(lambda: run(folder, *flags))
    raise AssertionError


def delete_at_once(folder: Path) -> None:
    """Delete a folder in which a process is writing, which would prevent the deletion of a folder in it."""
    shutil.rmtree(folder.rename(folder.with_name("gone")), ignore_errors=True)


@pytest.mark.slow
def test_a_folder_that_is_deleted_is_created_again(tmp_path, whole):
    folder = tmp_path / "run"
    child = start(folder, *SLOW)
    until(child, lambda: saved_step(folder) == 3)
    delete_at_once(folder)
    assert child.wait() == 0, child.text()
    assert child.text().count("was deleted during the run; it is created again") == 1
    assert_equal(tensors(folder), tensors(whole))
    assert (folder / "pipeline/model_index.json").is_file()
    assert (folder / "config.yaml").is_file()
    assert "was deleted during the run" in (folder / "run.log").read_text()
    again = start(folder)
    assert again.wait() == 0
    assert "is complete: 12 steps" in again.text()


@pytest.mark.slow
def test_a_folder_that_becomes_a_file_does_not_end_the_run_before_its_end(tmp_path):
    folder = tmp_path / "run"
    child = Child(lambda: run_and_report(folder, *FLAGS, *SLOW), tmp_path / "output.txt")
    until(child, lambda: saved_step(folder) == 3)
    delete_at_once(folder)
    folder.write_text("in the way")
    assert child.wait() == 2
    assert "the checkpoint of step 12 could not be written" in child.text()
    assert "Traceback" not in child.text()
    assert folder.read_text() == "in the way"


def test_a_reader_that_is_gone_does_not_end_the_run(tmp_path, whole):
    """As in `… | tee log`, with tee killed."""

    def without_a_reader() -> int:
        reader, writer = os.pipe()
        send_output_to(writer, "stdout")
        os.close(reader)
        return run_and_report(tmp_path / "run", *FLAGS)

    status, text = in_child(without_a_reader, tmp_path / "output.txt")
    assert status == 0, text
    assert text.count("stdout can no longer be written (Broken pipe); training continues") == 1
    assert "Traceback" not in text
    assert "stdout can no longer be written" in (tmp_path / "run/run.log").read_text()
    assert_same_state(tmp_path / "run", whole)


@needs_dev_full
def test_output_on_a_full_disk_does_not_end_the_run(tmp_path, whole):
    def on_a_full_disk() -> int:
        send_output_to(os.open("/dev/full", os.O_WRONLY))
        return run_and_report(tmp_path / "run", *FLAGS)

    assert in_child(on_a_full_disk, tmp_path / "output.txt")[0] == 0
    assert "stdout can no longer be written (No space left on device)" in (tmp_path / "run/run.log").read_text()
    assert_same_state(tmp_path / "run", whole)


@needs_dev_full
def test_a_user_error_without_a_reader_keeps_its_status(tmp_path):
    (tmp_path / "file").write_text("mine")
    with open("/dev/full", "w", encoding="utf-8") as device:
        words = [sys.executable, str(TOY), "--output_dir", str(tmp_path / "file")]
        assert subprocess.run(words, env=environment(), cwd=ROOT, stdout=device, stderr=device).returncode == 2


def test_a_killed_trainer_leaves_its_folder_at_once_although_its_workers_live(tmp_path):
    folder = tmp_path / "run"
    child = start(folder, *SLOW, "--dataloader_num_workers", "2")
    until(child, lambda: saved_step(folder) == 3)
    workers = psutil.Process(child.pid).children()
    assert len(workers) >= 2
    for worker in workers:
        worker.suspend()  # they would notice within five seconds that the trainer is gone
    with pytest.raises(UserError, match="another process is training"):
        RunFolder(folder).create()
    child.kill()
    again = RunFolder(folder)
    again.create()
    again.release()
    assert all(worker.is_running() for worker in workers)
    for worker in workers:
        worker.kill()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_few_file_descriptors_suffice(tmp_path, workers):
    """64 files beside those that earlier tests left open in this process; W&B and the Hub are off."""

    def limited() -> int:
        most = 64 + psutil.Process().num_fds()
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return run(tmp_path / "run", "--dataloader_num_workers", workers)

    status, text = in_child(limited, tmp_path / "output.txt")
    assert status == 0, text
