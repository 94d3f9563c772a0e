"""The queue of uploads: which failures are tried again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from training.publishing.content import Content
from training.publishing.upload_queue import Upload, UploadQueue


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1),  # minutes of waiting at the end of a run do not help
        (OSError(errno.EIO, os.strerror(errno.EIO)), 3),
        (ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)), 3),
        (TimeoutError("no answer"), 3),
    ],
)
def test_a_full_disk_is_final_and_other_errors_are_tried_again(tmp_path: Path, error: OSError, attempts: int):
    tried: list[str] = []
    lines: list[str] = []

    def send(upload: Upload) -> None:
        tried.append(upload.path_in_repo)
        raise error

    queue = UploadQueue(tmp_path, send, notify=lines.append, retry_delays=(0.01, 0.01))
    queue.add(Content("", tmp_path, "a message", "a fingerprint", written={"README.md": "A model."}))
    queue.wait(10)
    assert len(tried) == attempts
    assert queue.outcome == {"": False}
    assert len(lines) == 1
    assert "failed" in lines[0]
