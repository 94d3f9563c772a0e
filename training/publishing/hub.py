"""Uploads to the Hugging Face Hub while training continues.

`Publisher.check` verifies before the first step that uploads can work. After that, every upload runs on one background
thread, from a snapshot of the files, and is retried if it fails. A failing upload never ends a run: what is missing is
the difference between the run folder and the record hub.json, and is uploaded by `Publisher.catch_up`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.tools.commands import command
from training.core.options import Options, option
from training.publishing import content as hub_content
from training.publishing.content import HUB_STRATEGIES, Content
from training.publishing.hub_account import HubAccount, answer, read_token
from training.publishing.public import clean
from training.publishing.upload_queue import LARGEST_TEXT, TEXT_SUFFIXES, Notify, Upload, UploadQueue
from training.publishing.upload_record import UploadRecord
from training.run import checkpoint
from training.run.folder import RunFolder

RETRY_DELAYS = (5.0, 20.0, 60.0, 180.0)  # seconds; the client itself already retries each request for half a minute
FINISH_SECONDS = 3600.0
UPLOAD_FAILED_STATUS = 3  # exit status of a command that did everything except an upload


@dataclass
class HubConfig(Options):
    """Whether and how a run is uploaded to the Hugging Face Hub."""

    help_group = "Hub"

    push_to_hub: bool = option(False, on_resume="free", essential=True)
    """Upload the model to the Hub; --hub_strategy selects what is uploaded and when"""
    hub_model_id: str | None = option(None, on_resume="free")
    """Name of the Hub repository, as user/name; if unset, your user name and the name of the run folder"""
    hub_token_file: str | None = option(None, on_resume="free")
    """File that contains only an access token for the Hub; if unset, HF_TOKEN or the token of `hf auth login`"""
    hub_private_repo: bool = option(False, on_resume="free")
    """Create the repository as a private repository"""
    hub_strategy: str = option("end", on_resume="free", choices=tuple(HUB_STRATEGIES))
    """When to upload: end (final pipeline only), every_save (pipeline at each save), checkpoint (as every_save, plus
    the latest checkpoint) or all_checkpoints (as checkpoint, plus every checkpoint)"""
    license: str | None = option(None, on_resume="free")
    """Licence of the model, e.g. cc-by-4.0; if unset, the model card says that no licence was specified"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.push_to_hub and self.hub_token_file is not None:
            read_token(self.hub_token_file)


@dataclass
class PublishReport:
    """Result of the uploads: paths in the repository ("" is its root) whose latest version is on the Hub or missing."""

    uploaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


class Publisher:
    """Uploads one run to one model repository. Used on the main process only, which has locked the run folder.

    Args:
        config: the repository, the token and the strategy.
        folder: the run folder.
        notify: function that shows a line to the user.
        retry_delays: seconds to wait before each further attempt at a failed upload.
    """

    def __init__(
        self,
        config: HubConfig,
        *,
        folder: RunFolder,
        notify: Notify = tqdm.write,
        retry_delays: Sequence[float] = RETRY_DELAYS,
    ):
        self.model_id = config.hub_model_id or Path(os.path.abspath(folder.path)).name
        self.folder, self.strategy = folder, config.hub_strategy
        self.account = HubAccount(config.hub_token_file)
        self.report = PublishReport()
        self._private, self._notify = config.hub_private_repo, notify
        self._record = UploadRecord(folder.path)
        self._queue = UploadQueue(folder.path, self._send, notify=notify, retry_delays=retry_delays)
        self._shown = PublishReport()
        self._stopped = False

    @property
    def url(self) -> str:
        return f"{self.account.endpoint}/{self.model_id}"

    @property
    def has_content(self) -> bool:
        """Whether there is anything in the run folder that the strategy uploads."""
        return any(True for _ in self._contents())

    def check(self) -> None:
        """Check, before the first step, that a token exists, is valid and may write; create the repository if needed.

        Raises:
            UserError: if one of these conditions does not hold; the message says how to fix it.
        """
        try:
            self.model_id, existed = answer(lambda: self.account.make_repository(self.model_id, self._private))
        except TimeoutError as error:
            raise self.account.unreachable(error) from None
        if not existed:
            with contextlib.suppress(OSError):  # everything is compared with the Hub anyway
                self._record.forget(self.url)

    def push(self) -> int:
        """Upload everything that should be on the Hub now and is not, and wait for it.

        Returns:
            The exit status: 0, or 3 if something could not be uploaded.

        Raises:
            UserError: see `check`.
        """
        if not self.is_behind():
            self._queue.clear_leftovers()
            self._queue.wait(0.0)
            self._notify(f"everything is already uploaded to {self.url}")
            return 0
        self.check()
        self.catch_up()
        self.finish()
        return self.status

    @property
    def status(self) -> int:
        """The exit status of a complete run whose uploads were waited for."""
        return UPLOAD_FAILED_STATUS if self.report.missing else 0

    def is_behind(self) -> bool:
        """Return whether something of the run is not on the Hub, as far as its record says; does not use the network.

        A name without a user is completed from the record.
        """
        if "/" not in self.model_id:
            known = [url for url in self._record.repositories() if url.startswith(f"{self.account.endpoint}/")]
            names = [url.removeprefix(f"{self.account.endpoint}/") for url in known]
            self.model_id = next((name for name in names if name.endswith(f"/{self.model_id}")), self.model_id)
        try:
            return any(not self._has(content) for content in self._contents()) or self._queue.has_leftovers
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            checkpoint.DamagedCheckpoint,
        ):  # `catch_up` reports what is damaged
            return True

    def catch_up(self) -> None:
        """Queue everything that should be on the Hub now and is not, also what earlier sessions did not upload."""
        for snapshot in self._queue.clear_leftovers():
            self._add_leftover(snapshot)
        self._guarded(lambda: self._add(self._contents()), self.folder.path)

    def upload(self, folder: str | os.PathLike[str], message: str, path_in_repo: str = "") -> None:
        """Queue `folder` for upload as it is now, without training state; it may change or be deleted afterwards.

        A newer upload to the same `path_in_repo` replaces one that is still waiting. This method never raises: a
        failure is reported in one warning.

        Args:
            message: the commit message.
            path_in_repo: folder in the repository; "" is its root.
        """
        self._guarded(lambda: self._queue.add(hub_content.folder_content(Path(folder), message, path_in_repo)), folder)

    def checkpoint_saved(self, saved: Path) -> None:
        """Queue the parts of a checkpoint that the strategy uploads: its `pipeline/`, or all of it. Never raises."""
        if self.strategy != "end":
            self._guarded(lambda: self._add(hub_content.pipeline_of_checkpoint(saved)), saved)
            self._guarded(lambda: self._add(hub_content.checkpoint_contents(self.folder, saved, self.strategy)), saved)

    def finish(self, timeout: float | None = FINISH_SECONDS) -> PublishReport:
        """Wait up to `timeout` seconds for queued uploads; report what is on the Hub and how to upload the rest.

        If a signal interrupts the waiting, later calls do not wait.
        """
        if self._queue.is_busy and not self._stopped:
            self._notify(f"Finishing the upload to {self.url} ...")
        try:
            self._queue.wait(0.0 if self._stopped else timeout)
        except BaseException:
            self._stopped = True
            raise
        outcome = self._queue.outcome
        self.report = PublishReport(
            uploaded=[path for path, done in outcome.items() if done],
            missing=[path for path, done in outcome.items() if not done],
        )
        if self.report != self._shown:
            self._shown = self.report
            self._show(self.report)
        return self.report

    def _contents(self) -> Iterable[Content]:
        return hub_content.contents(self.folder, self.strategy, self.model_id)

    def _add(self, contents: Iterable[Content]) -> None:
        for content in contents:
            if not self._has(content):
                self._queue.add(content)

    def _has(self, content: Content) -> bool:
        return self._record.has(self.url, content.path_in_repo, content.fingerprint)

    def _guarded(self, action: Any, source: str | os.PathLike[str]) -> None:
        """Run `action`; what it raises because files are missing or damaged costs a warning."""
        try:
            action()
        except (OSError, ValueError, KeyError, TypeError, checkpoint.DamagedCheckpoint) as error:
            self._queue.failed("", Path(source), error)

    def _add_leftover(self, snapshot: Path) -> None:
        """Queue a checkpoint that an earlier session could not upload and that was deleted since, if it is complete."""
        name = snapshot.name.partition("-")[2]
        path = f"{hub_content.CHECKPOINTS}/{name}"
        original = self.folder.checkpoints / name
        try:
            checkpoint.verify(snapshot)
        except checkpoint.DamagedCheckpoint:
            complete = False
        else:
            complete = self.strategy == "all_checkpoints" and not original.is_dir()
        if complete:
            fingerprint = hub_content.manifest_digest(snapshot)
            self._queue.add_leftover(Upload(path, original, f"{name}: checkpoint", fingerprint, snapshot))
        else:
            self._queue.discard(snapshot)

    def _send(self, upload: Upload) -> None:
        """Upload a snapshot in one commit, and note it in the record; runs on the background thread."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        quiet = not are_progress_bars_disabled()
        if quiet:
            disable_progress_bars()  # they would overwrite the progress bar of training
        try:
            api, prefix = self.account.api, f"{upload.path_in_repo}/" if upload.path_in_repo else ""
            files = {
                prefix + path.relative_to(upload.snapshot).as_posix(): path
                for path in sorted(upload.snapshot.rglob("*"))
                if path.is_file()
            }
            additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            for addition, path in zip(additions, files.values(), strict=True):
                # One at a time: the client uploads several files on threads for which the process would wait at its
                # end, however long the Hub does not answer.
                if path.suffix not in TEXT_SUFFIXES or path.stat().st_size > LARGEST_TEXT:
                    api.preupload_lfs_files(self.model_id, additions=[addition])
            outdated = self._outdated(api, upload.path_in_repo, set(files))
            api.create_commit(self.model_id, [*additions, *outdated], commit_message=clean(upload.message))
        finally:
            if quiet:
                enable_progress_bars()
        self._record.note(self.url, upload.path_in_repo, upload.fingerprint)

    def _outdated(self, api: Any, path_in_repo: str, names: set[str]) -> list[Any]:
        """Return the deletions in a subfolder, which is replaced as a whole; the root keeps its other contents."""
        from huggingface_hub import CommitOperationDelete
        from huggingface_hub.errors import EntryNotFoundError

        if not path_in_repo:
            return []
        try:
            entries = list(api.list_repo_tree(self.model_id, path_in_repo, recursive=True))
        except EntryNotFoundError:
            return []
        present = {entry.path for entry in entries if hasattr(entry, "size")}  # folders have no size
        return [CommitOperationDelete(name, is_folder=False) for name in sorted(present - names)]

    def _show(self, report: PublishReport) -> None:
        if report.uploaded:
            self._notify(f"Uploaded to {self.url}: {', '.join(path or 'the model' for path in report.uploaded)}")
        if report.missing:
            places = ", ".join(path or "the model" for path in report.missing)
            retry = command(f"training/push_to_hub.py {self.folder.path} --hub_model_id {self.model_id}")
            strategy = "" if self.strategy == "end" else f" --hub_strategy {self.strategy}"
            self._notify(
                f"warning: not uploaded to {self.url}: {places}; run the same command again, or: {retry}{strategy}"
            )
