"""Uploads on a background thread, from snapshots of the files, with further attempts if one fails."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.tools.cli import cause
from pipelines.tools.credentials import mask_credentials
from training.publishing.content import CHECKPOINTS, Content
from training.publishing.hub_account import is_final

FOLDER = ".hub_queue"
TEXT_SUFFIXES = {".json", ".yaml", ".yml", ".md", ".txt", ".csv", ".toml", ".py", ".log", ".jsonl", ".sh", ".ini", ""}
LARGEST_TEXT = 4_000_000  # bytes of a file that is searched for access tokens
POLL_SECONDS = 0.2

Notify = Callable[[str], None]


@dataclass
class Upload:
    """Files to be uploaded, as they were when they were queued."""

    path_in_repo: str
    source: Path
    message: str
    fingerprint: str
    snapshot: Path


class UploadQueue:
    """Uploads one snapshot after another; a newer one for the same path replaces one that is still waiting.

    A failing upload is reported in one warning and never raises.

    Args:
        run_dir: the run folder; snapshots are kept in a hidden folder in it, on the same disk as the checkpoints.
        send: uploads a snapshot and notes that it is on the Hub, or raises. Called on the background thread.
        notify: function that shows a line to the user.
        retry_delays: seconds to wait before each further attempt at a failed upload.
    """

    def __init__(
        self,
        run_dir: Path,
        send: Callable[[Upload], None],
        *,
        notify: Notify,
        retry_delays: Sequence[float],
    ):
        self.folder = run_dir / FOLDER
        self.outcome: dict[str, bool] = {}
        """Whether the latest content of each path in the repository is on the Hub."""
        self._send, self._notify = send, notify
        self._retry_delays = tuple(retry_delays)
        self._number = 0
        self._pending: OrderedDict[str, Upload] = OrderedDict()
        self._running: Upload | None = None
        self._changed = threading.Condition()
        self._warned = False
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        return bool(self._pending or self._running)

    @property
    def has_leftovers(self) -> bool:
        """Whether there are checkpoints that an earlier process had queued."""
        return any(self.folder.glob("*-step-*"))

    def add(self, content: Content) -> None:
        """Queue the content as it is now; its files may change or be deleted afterwards. Never raises."""
        if any((u.path_in_repo, u.fingerprint) == (content.path_in_repo, content.fingerprint) for u in self._active()):
            return
        self._number += 1
        # The name of a checkpoint shows what an unfinished upload of it is, if this process is killed.
        name = content.source.name if content.path_in_repo.startswith(f"{CHECKPOINTS}/") else "files"
        snapshot = self.folder / f"{self._number:06d}-{name}"
        try:
            self._write_snapshot(content, snapshot)
        except OSError as error:  # e.g. the disk is full, or the folder was deleted
            shutil.rmtree(snapshot, ignore_errors=True)
            self.failed(content.path_in_repo, content.source, error)
            return
        self._add(Upload(content.path_in_repo, content.source, content.message, content.fingerprint, snapshot))

    def wait(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds until everything is uploaded or has failed, and give up what is unfinished."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.is_busy and (deadline is None or time.monotonic() < deadline):
            with self._changed:
                self._changed.wait_for(lambda: not self.is_busy, timeout=min(POLL_SECONDS, timeout or POLL_SECONDS))
        with self._changed:
            unfinished = [*self._pending, *([self._running.path_in_repo] if self._running else [])]
            self.outcome.update(dict.fromkeys(unfinished, False))
            self._pending.clear()
            self._running = None
            self._thread = None  # the old thread notices this and stops; a later upload starts another
            self._changed.notify_all()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def clear_leftovers(self) -> list[Path]:
        """Delete snapshots of a killed process or of failed uploads, except checkpoints, which may not exist elsewhere.

        Returns:
            The snapshots of checkpoints, which may be incomplete.
        """
        kept, active = [], [upload.snapshot for upload in self._active()]
        for snapshot in sorted(self.folder.glob("*")):
            if snapshot in active:
                continue
            number, _, name = snapshot.name.partition("-")
            if number.isdigit() and name.startswith("step-"):
                self._number = max(self._number, int(number))
                kept.append(snapshot)
            else:
                shutil.rmtree(snapshot, ignore_errors=True)
        return kept

    def add_leftover(self, upload: Upload) -> None:
        """Queue a snapshot that `clear_leftovers` returned."""
        self._add(upload)

    def discard(self, snapshot: Path) -> None:
        """Delete a snapshot that `clear_leftovers` returned."""
        shutil.rmtree(snapshot, ignore_errors=True)

    def _active(self) -> list[Upload]:
        with self._changed:
            return [*self._pending.values(), *([self._running] if self._running else [])]

    def _add(self, upload: Upload) -> None:
        with self._changed:
            replaced = self._pending.pop(upload.path_in_repo, None)
            self._pending[upload.path_in_repo] = upload
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hub-upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if replaced:
            shutil.rmtree(replaced.snapshot, ignore_errors=True)

    def _write_snapshot(self, content: Content, snapshot: Path) -> None:
        for files, place in ((content.fixed, _link_or_copy), (content.changing, shutil.copy2)):
            for name, path in files.items():
                if self._holds_secret(path):
                    self._notify(f"warning: {path} seems to contain an access token and is not uploaded; remove it")
                    continue
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                place(path, snapshot / name)
        for name, text in content.written.items():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_text(text, encoding="utf-8", newline="\n")

    def _holds_secret(self, path: Path) -> bool:
        if path.suffix not in TEXT_SUFFIXES or path.stat().st_size > LARGEST_TEXT:
            return False
        text = path.read_text(encoding="utf-8", errors="ignore")
        return mask_credentials(text) != text

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._dismissed())
                if self._dismissed():
                    return
                _, upload = self._pending.popitem(last=False)
                self._running = upload
            error = self._attempt(upload)
            if error is None or not self._keeps(upload):
                shutil.rmtree(upload.snapshot, ignore_errors=True)
            with self._changed:
                if self._dismissed():  # `wait` has already given this upload up
                    return
                self._running = None
                superseded = upload.path_in_repo in self._pending
                if error is None:
                    self.outcome[upload.path_in_repo] = True
                elif not superseded:
                    self.failed(upload.path_in_repo, upload.source, error)
                self._changed.notify_all()

    def _dismissed(self) -> bool:
        return self._thread is not threading.current_thread()

    def _attempt(self, upload: Upload) -> Exception | None:
        """Upload, and retry after each of the delays; returns the last error, or None on success."""
        for delay in (*self._retry_delays, None):
            try:
                self._send(upload)
                return None
            except Exception as error:  # an error of the network or the server must not end a run
                if delay is None or is_final(error):
                    return error
                last = error
            with self._changed:
                given_up = lambda: self._dismissed() or upload.path_in_repo in self._pending  # noqa: E731
                if self._changed.wait_for(given_up, timeout=delay):  # the run ends, or a newer upload waits
                    return last
        return None

    def _keeps(self, upload: Upload) -> bool:
        """Return whether the snapshot of a failed upload is kept: of a checkpoint, which the run folder may delete.

        It is not kept if the disk has little space, because that would end the run.
        """
        if not upload.path_in_repo.startswith(f"{CHECKPOINTS}/"):
            return False
        try:
            size = sum(path.stat().st_size for path in upload.snapshot.rglob("*") if path.is_file())
            return shutil.disk_usage(self.folder).free > 4 * size
        except OSError:  # the run folder was deleted
            return False

    def failed(self, path_in_repo: str, source: Path, error: Exception) -> None:
        """Remember that the latest content of a path is not on the Hub; the first time, say so."""
        self.outcome[path_in_repo] = False
        if not self._warned:
            self._warned = True
            self._notify(f"warning: uploading {source} failed: {cause(error)}")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or with too many to this file
        shutil.copy2(source, target)
