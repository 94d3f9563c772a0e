"""Uploads to the Hugging Face Hub while training continues.

`Publisher.check` verifies before the first step that uploads can work. After that, every upload runs on one background
thread, from a snapshot of the files, and is retried if it fails. A failing upload never ends a run.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.tools.cli import UserError, cause, one_line
from pipelines.tools.credentials import mask_credentials, remember_credential
from training.core.options import Options, option

# What a run uploads, and when; the same strategies as in the Transformers Trainer.
HUB_STRATEGIES = {
    "end": "the final pipeline, once",
    "every_save": "the pipeline at every checkpoint",
    "checkpoint": "as every_save, and the newest checkpoint (optimizer state included) as last-checkpoint/",
    "all_checkpoints": "as every_save, and every checkpoint under checkpoints/",
}
RETRY_DELAYS = (5.0, 20.0, 60.0, 180.0)  # seconds; the client itself already retries each request for half a minute
TRAINING_STATE = ("*optimizer*", "*grad_scaler*", "*random_state*", "*trainer_state*", ".*", "*/.*")
SECRETS = (".env*", "*/.env*", ".netrc", "*/.netrc", "*.pem", "*.key", "id_rsa*", "*/id_rsa*", ".git/*", "wandb/*")
MOST_TOKEN_BYTES = 10_000  # a larger file was named by mistake
TEXT_SUFFIXES = {".json", ".yaml", ".yml", ".md", ".txt", ".csv", ".toml", ".py", ".log", ".jsonl", ".sh", ".ini", ""}

Notify = Callable[[str], None]


@dataclass
class HubConfig(Options):
    """Whether and how a run is uploaded to the Hugging Face Hub."""

    push_to_hub: bool = option(False, on_resume="free")
    """Upload the model to the Hub; --hub_strategy selects what is uploaded and when"""
    hub_model_id: str | None = option(None, on_resume="free")
    """Name of the Hub repository, as user/name; if unset, your user name and the name of the run folder"""
    hub_token_file: str | None = option(None, on_resume="free")
    """File that contains only an access token for the Hub; if unset, HF_TOKEN or the token of `hf auth login`"""
    hub_private_repo: bool = option(False, on_resume="free")
    """Create the repository as a private repository"""
    hub_strategy: str = option("end", on_resume="free", choices=tuple(HUB_STRATEGIES))
    """When to upload: end (final pipeline only), every_save (pipeline at each save), checkpoint (as every_save, plus
    the latest checkpoint) or all_checkpoints (as every_save, plus every checkpoint)"""
    license: str | None = option(None, on_resume="free")
    """Licence of the model, e.g. cc-by-4.0; if unset, the model card says that no licence was specified"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.push_to_hub and self.hub_token_file is not None:
            read_token(self.hub_token_file)


def read_token(path: str) -> str:
    """Return the access token in the file `--hub_token_file`.

    Raises:
        UserError: the file cannot be read, is empty, or contains more than a token. The message does not show any of
            its content.
    """
    fix = "name a file that contains only the token, or leave the flag out to use HF_TOKEN or `hf auth login`"
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(MOST_TOKEN_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:  # a path with a null character; an unknown user after ~
        reason = getattr(error, "strerror", None) or "not a valid path"
        raise UserError(f"--hub_token_file {path} cannot be read ({reason}); {fix}") from None
    token = content.decode("utf-8-sig", errors="replace").strip()
    if not token:
        raise UserError(f"--hub_token_file {path} is empty; {fix}")
    if len(content) > MOST_TOKEN_BYTES or not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"--hub_token_file {path} contains something other than one token; {fix}")
    remember_credential(token)
    return token


@dataclass
class PublishReport:
    """Result of the uploads: paths in the repository ("" is its root) whose latest version is on the Hub or missing."""

    uploaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass
class _Upload:
    source: Path  # the folder that the user can upload by hand
    snapshot: Path
    path_in_repo: str
    message: str


class Publisher:
    """Uploads one run to one model repository. Used on the main process only.

    Args:
        config: the repository, the token and the strategy.
        run_dir: the run folder; snapshots are kept in a hidden folder in it, on the same disk as the checkpoints.
        notify: function that shows a line to the user.
        retry_delays: seconds to wait before each further attempt at a failed upload.
    """

    def __init__(
        self,
        config: HubConfig,
        *,
        run_dir: Path,
        notify: Notify = tqdm.write,
        retry_delays: Sequence[float] = RETRY_DELAYS,
    ):
        self.model_id = config.hub_model_id or run_dir.name
        self.run_dir = run_dir
        self.strategy = config.hub_strategy
        self._token_file, self._private = config.hub_token_file, config.hub_private_repo
        self._token: str | None = None  # None uses HF_TOKEN or the stored login
        self._notify = notify
        self._retry_delays = tuple(retry_delays)
        self._queue_dir = run_dir / ".hub_queue"
        self._numbers = count()
        self._pending: OrderedDict[str, _Upload] = OrderedDict()
        self._running: _Upload | None = None
        self._outcome: dict[str, bool] = {}  # by path in the repo: whether its latest version is on the Hub
        self._sources: dict[str, Path] = {}
        self._changed = threading.Condition()
        self._warned = False
        self._news = False  # whether uploads were queued or failed since `finish` last reported
        self._thread: threading.Thread | None = None
        self._api: Any = None

    @property
    def wants_pipeline_at_save(self) -> bool:
        """Whether a pipeline is exported and uploaded at every checkpoint."""
        return self.strategy != "end"

    @property
    def url(self) -> str:
        return f"{self._hub_api().endpoint}/{self.model_id}"

    def check(self) -> None:
        """Check, before the first step, that a token exists, is valid and may write; create the repository if needed.

        Raises:
            UserError: if one of these conditions does not hold; the message says how to fix it.
        """
        shutil.rmtree(self._queue_dir, ignore_errors=True)  # left over from an interrupted run
        api = self._hub_api()
        account = self._account(api)
        if "/" not in self.model_id:
            self.model_id = f"{account['name']}/{self.model_id}"
        self._check_name()
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(
                f"--push_to_hub: the token of '{account['name']}' can only read; create one with write access at "
                f"{api.endpoint}/settings/tokens, then run `hf auth login`, set HF_TOKEN or use --hub_token_file"
            )
        self._make_repo(api, account)

    def upload(self, folder: str | os.PathLike[str], message: str, path_in_repo: str = "") -> None:
        """Queue `folder` for upload as it is now, without training state; it may change or be deleted afterwards.

        A newer upload to the same `path_in_repo` replaces one that is still waiting. This method never raises: a
        failure is reported in one warning.

        Args:
            message: the commit message.
            path_in_repo: folder in the repository; "" is its root.
        """
        self._enqueue(Path(folder), message, path_in_repo, leave_out=TRAINING_STATE, link=False)

    def checkpoint_saved(self, folder: str | os.PathLike[str]) -> None:
        """Queue the parts of a checkpoint that the strategy uploads: its `pipeline/`, or all of it. Never raises."""
        folder = Path(folder)
        # A checkpoint never changes once it is written, so hard links to its files can replace copies.
        if self.wants_pipeline_at_save and (folder / "pipeline").is_dir():
            self._enqueue(folder / "pipeline", folder.name, "", leave_out=TRAINING_STATE, link=True)
        if self.strategy == "checkpoint":
            self._enqueue(folder, f"{folder.name}: checkpoint", "last-checkpoint", leave_out=(), link=True)
        elif self.strategy == "all_checkpoints":
            self._enqueue(folder, f"{folder.name}: checkpoint", f"checkpoints/{folder.name}", leave_out=(), link=True)

    def finish(self, timeout: float | None = 3600.0) -> PublishReport:
        """Wait up to `timeout` seconds for queued uploads; report what is on the Hub and how to upload the rest."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            if self._pending or self._running:
                self._notify(f"Finishing the upload to {self.url} ...")
            while self._pending or self._running:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left if left is None else min(left, 1.0))
            unfinished = [*self._pending, *([self._running.path_in_repo] if self._running else [])]
            self._outcome.update(dict.fromkeys(unfinished, False))
            self._pending.clear()
            self._running = None
            self._thread = None  # the old thread notices this and stops; a later upload starts another
            self._changed.notify_all()
        if not unfinished:
            shutil.rmtree(self._queue_dir, ignore_errors=True)
        report = PublishReport(
            uploaded=[path for path, done in self._outcome.items() if done],
            missing=[path for path, done in self._outcome.items() if not done],
        )
        if self._news:
            self._news = False
            self._show(report)
        return report

    def _hub_api(self) -> Any:
        if self._api is None:
            from huggingface_hub import HfApi

            if self._token_file is not None:
                self._token = read_token(self._token_file)
            # HF_ENDPOINT is read here because the library reads it only once, when it is first imported.
            self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=self._token)
        return self._api

    def _account(self, api: Any) -> dict[str, Any]:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        if not (self._token or get_token()):
            raise UserError(
                "--push_to_hub: no Hugging Face token was found; run `hf auth login`, set HF_TOKEN to a token with "
                f"write access ({api.endpoint}/settings/tokens), name a file that contains it with --hub_token_file, "
                "or leave out --push_to_hub"
            )
        try:
            return api.whoami()
        except HfHubHTTPError as error:
            if _status(error) in (401, 403):
                raise UserError(
                    f"--push_to_hub: {api.endpoint} does not accept the token ({self._token_source()}): "
                    f"{cause(error)}; create a new one at {api.endpoint}/settings/tokens"
                ) from None
            raise self._unreachable(error) from None
        except Exception as error:  # no network, a wrong HF_ENDPOINT, HF_HUB_OFFLINE=1: the client has many classes
            raise self._unreachable(error) from None

    def _token_source(self) -> str:
        return "HF_TOKEN, or the stored login" if self._token_file is None else f"--hub_token_file {self._token_file}"

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(
            f"--push_to_hub: {self._hub_api().endpoint} could not be reached ({cause(error)}); check the network "
            "and HF_ENDPOINT, or leave out --push_to_hub and upload the pipeline after training"
        )

    def _check_name(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.model_id)
        except HFValidationError as error:
            raise UserError(f"--hub_model_id {self.model_id}: {one_line(error, 300)}") from None

    def _make_repo(self, api: Any, account: dict[str, Any]) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            api.create_repo(self.model_id, private=self._private, exist_ok=True)
            api.auth_check(self.model_id, write=True)
        except HfHubHTTPError as error:
            if _status(error) in (401, 403, 404):
                own = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
                raise UserError(
                    f"--hub_model_id {self.model_id}: '{account['name']}' may not write there ({cause(error)}); "
                    f"use one of this account's namespaces ({', '.join(own)}) or a token that may write there"
                ) from None
            raise self._unreachable(error) from None
        except Exception as error:  # the connection broke between two requests
            raise self._unreachable(error) from None

    def _enqueue(self, folder: Path, message: str, path_in_repo: str, leave_out: Sequence[str], link: bool) -> None:
        path_in_repo = path_in_repo.strip("/")
        snapshot = self._queue_dir / f"{next(self._numbers):06d}"
        try:
            self._snapshot(folder, snapshot, leave_out, link)
        except OSError as error:  # e.g. the disk is full, or the folder was deleted
            shutil.rmtree(snapshot, ignore_errors=True)
            self._failed(path_in_repo, folder, error)
            return
        with self._changed:
            replaced = self._pending.pop(path_in_repo, None)
            self._pending[path_in_repo] = _Upload(folder, snapshot, path_in_repo, message)
            self._sources[path_in_repo] = folder
            self._news = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hub-upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if replaced:
            shutil.rmtree(replaced.snapshot, ignore_errors=True)

    def _snapshot(self, folder: Path, snapshot: Path, leave_out: Sequence[str], link: bool) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.is_file() or any(fnmatch(name, pattern) for pattern in (*leave_out, *SECRETS)):
                continue
            if self._holds_secret(path):
                self._notify(f"warning: {path} seems to contain an access token and is not uploaded; remove the token")
                continue
            target = snapshot / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path, target) if link else shutil.copy2(path, target)

    def _holds_secret(self, path: Path) -> bool:
        if path.suffix not in TEXT_SUFFIXES or path.stat().st_size > 4_000_000:
            return False
        text = path.read_text(encoding="utf-8", errors="ignore")
        return mask_credentials(text) != text or (self._token is not None and self._token in text)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._dismissed())
                if self._dismissed():
                    return
                _, upload = self._pending.popitem(last=False)
                self._running = upload
            error = self._attempt(upload)
            shutil.rmtree(upload.snapshot, ignore_errors=True)
            with self._changed:
                if self._dismissed():  # `finish` has already reported this upload as missing
                    return
                self._running = None
                self._outcome[upload.path_in_repo] = error is None
                superseded = upload.path_in_repo in self._pending
                if error is not None and not superseded:
                    self._failed(upload.path_in_repo, upload.source, error)
                self._changed.notify_all()

    def _dismissed(self) -> bool:
        return self._thread is not threading.current_thread()

    def _attempt(self, upload: _Upload) -> Exception | None:
        """Upload, and retry after each of the delays; returns the last error, or None on success."""
        for delay in (*self._retry_delays, None):
            try:
                self._send(upload)
                return None
            except Exception as error:  # whatever the network or the server does must not end a run
                if delay is None or _is_final(error):
                    return error
                last = error
            with self._changed:
                given_up = lambda: self._dismissed() or upload.path_in_repo in self._pending  # noqa: E731
                if self._changed.wait_for(given_up, timeout=delay):  # the run ends, or a newer upload waits
                    return last
        return None

    def _send(self, upload: _Upload) -> None:
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        quiet = not are_progress_bars_disabled()
        if quiet:
            disable_progress_bars()  # they would overwrite the progress bar of training
        try:
            self._hub_api().upload_folder(
                repo_id=self.model_id,
                folder_path=upload.snapshot,
                path_in_repo=upload.path_in_repo or None,
                commit_message=upload.message,
                # A subfolder is replaced as a whole; the root keeps its other contents (checkpoints).
                delete_patterns="*" if upload.path_in_repo else None,
            )
        finally:
            if quiet:
                enable_progress_bars()

    def _failed(self, path_in_repo: str, source: Path, error: Exception) -> None:
        self._news = True
        self._outcome[path_in_repo] = False
        self._sources[path_in_repo] = source
        if not self._warned:
            self._warned = True
            self._notify(f"warning: uploading {source} to {self.model_id} failed, training continues: {cause(error)}")

    def _show(self, report: PublishReport) -> None:
        if report.uploaded:
            places = ", ".join(path or "the model" for path in report.uploaded)
            self._notify(f"Uploaded to {self.url}: {places}")
        for path in report.missing:
            command = f"hf upload {self.model_id} {self._sources[path]} {path or '.'}"
            self._notify(f"warning: not uploaded: {path or 'the model'}; to upload it by hand: {command}")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or with too many to this file
        shutil.copy2(source, target)


def _is_final(error: Exception) -> bool:
    """Return whether a retry cannot help: no permission, no repository, or content that the Hub rejects."""
    return _status(error) in (400, 401, 403, 404, 413, 422) or isinstance(error, (ValueError, TypeError))


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of `error`, or of one of the errors it was raised from; None without a status."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__  # type: ignore[assignment]
    return None
