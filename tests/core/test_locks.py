"""Locks of folders: one process at a time, free after its end, and never somebody else where locks are missing."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from pipelines.tools.cli import UserError
from tests.support.child import Child, can_refuse, in_child, refuse, wait_until
from training.core.locks import FolderLock
from training.run.output import start_logging


def lock_of(folder) -> FolderLock:
    return FolderLock(folder / ".lock", "another process is using it")


def test_only_one_process_at_a_time(tmp_path):
    with lock_of(tmp_path), pytest.raises(UserError, match="another process is using it"):
        lock_of(tmp_path).acquire()
    with lock_of(tmp_path):
        pass


def test_it_is_free_at_once_after_a_kill_although_workers_live_on(tmp_path):
    """Data-loading workers are forked while the lock is held, and outlive a killed trainer for some seconds."""

    def trainer() -> None:
        lock = lock_of(tmp_path)
        lock.acquire()
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / "worker.part").write_text(str(worker))
        (tmp_path / "worker.part").rename(tmp_path / "worker")
        time.sleep(60)

    child = Child(trainer, tmp_path / "output")
    wait_until((tmp_path / "worker").is_file)
    with pytest.raises(UserError):
        lock_of(tmp_path).acquire()
    child.kill()
    worker = int((tmp_path / "worker").read_text())
    try:
        with lock_of(tmp_path):
            os.kill(worker, 0)  # it is alive
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_forked_child_does_not_release_the_lock_of_its_parent(tmp_path):
    with lock_of(tmp_path):
        assert in_child(lambda: None, tmp_path / "output")[0] == 0
        with pytest.raises(UserError):
            lock_of(tmp_path).acquire()


@can_refuse
@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_not_another_process(tmp_path, error):
    def use() -> None:
        start_logging(tmp_path / "run.log")
        refuse(error, "flock")
        with lock_of(tmp_path):
            print("inside")

    status, text = in_child(use, tmp_path / "output")
    assert status == 0, text
    assert "inside" in text
    assert f"cannot be locked ({os.strerror(error)}); make sure that no other process" in text


def test_a_lock_of_a_folder_that_was_renamed_meanwhile_is_not_that_of_the_new_one(tmp_path):
    """`--overwrite` renames the folder while it holds the lock; who waits for it must lock the new folder."""
    old, new = tmp_path / "old", tmp_path / "run"
    new.mkdir()
    with lock_of(new) as lock:
        new.rename(old)
        new.mkdir()
        with lock_of(new) as other:
            assert (new / ".lock").samefile(f"/proc/self/fd/{other._open.fileno()}")
        assert (old / ".lock").samefile(f"/proc/self/fd/{lock._open.fileno()}")
