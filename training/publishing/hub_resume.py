"""Resumes a run on another machine from the checkpoint that `--hub_strategy checkpoint` uploaded to the Hub.

`last-checkpoint/` is downloaded into a hidden folder, where an interrupted download is continued, and compared with its
manifest. Only then does it become a checkpoint of the run folder. Nothing in it is executed: a checkpoint is restored
from safetensors and JSON files.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipelines.tools.cli import UserError, cause
from training.core.files import write_atomically
from training.core.options import Options
from training.publishing.content import BEST, CONFIG_FILE, LAST_CHECKPOINT, RUN_FILES
from training.publishing.hub import HubConfig
from training.publishing.hub_account import HubAccount, answer, check_name, status_of
from training.run import checkpoint
from training.run.folder import RunFolder
from training.run.metrics_log import read_metrics
from training.run.state import STATE_FILE

logger = logging.getLogger("halftone")

HUB = "hub"  # the repository of the run itself
FOLDER = ".hub_download"
_REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")


class _NotThere(Exception):
    """Raised if the repository does not exist, or contains no checkpoint."""


@dataclass
class _Remote:
    """A checkpoint in a repository, at one commit."""

    repository: str
    commit: str
    place: Path
    """The folder that the repository's files are downloaded to."""
    sizes: dict[str, int]
    """Size in bytes of each file below last-checkpoint/."""
    step: int
    best_step: int


def is_on_hub(name: str) -> bool:
    """Return whether `--resume_from_checkpoint name` means a checkpoint on the Hub rather than one on this machine."""
    return name == HUB or (_REPOSITORY.fullmatch(name) is not None and not Path(name).exists())


def fetch(name: str, folder: RunFolder, config: HubConfig, settings: Options) -> None:
    """Download the checkpoint `last-checkpoint/` into a run folder, unless this has a checkpoint of the same step or a
    later one.

    Args:
        name: `hub`, for the repository of the run itself, or the name of a repository, as user/name or
            user/name@revision.
        folder: the run folder, which this process has locked.
        config: the repository of the run, and the token.
        settings: the settings of this session, which must not differ from those of the checkpoint.

    Raises:
        UserError: the checkpoint does not exist, is damaged or of another run, or the Hub cannot be reached.
    """
    fetcher = _Fetcher(name, folder, config)
    own = _own_step(folder)
    try:
        remote = fetcher.find()
    except _NotThere as missing:
        if name == HUB and config.push_to_hub and config.hub_strategy in ("checkpoint", "all_checkpoints"):
            logger.info("%s; it will be uploaded there", missing)  # the first session of this run
            return
        raise UserError(
            f"--resume_from_checkpoint {name}: {missing}. A run uploads it with --push_to_hub true --hub_strategy "
            "checkpoint; to start or resume without it, leave out --resume_from_checkpoint"
        ) from None
    except UserError as error:
        if own is None:
            raise
        logger.warning("%s. Resuming from the checkpoint of step %d in %s", error, own, folder.checkpoints)
        return
    if own is not None and own >= remote.step:
        logger.info("the checkpoint in %s is of step %d, the one on the Hub of step %d", folder.path, own, remote.step)
        return
    fetcher.download(remote, settings)
    fetcher.install(remote)
    shutil.rmtree(folder.path / FOLDER, ignore_errors=True)
    logger.info("downloaded the checkpoint of step %d from %s", remote.step, fetcher.repository)


class _Fetcher:
    def __init__(self, name: str, folder: RunFolder, config: HubConfig):
        self.flag = f"--resume_from_checkpoint {name}"
        self.folder = folder
        self.account = HubAccount(config.hub_token_file, self.flag)
        match = _REPOSITORY.fullmatch(name)
        self.repository = match["name"] if match else config.hub_model_id or Path(os.path.abspath(folder.path)).name
        self.revision = match["revision"] if match else None

    def find(self) -> _Remote:
        """Look the checkpoint up. Raises _NotThere or UserError."""
        try:
            return answer(self._find)
        except TimeoutError as error:
            raise self.account.unreachable(error) from None

    def download(self, remote: _Remote, settings: Options) -> None:
        """Download and verify the checkpoint, and the best one if it is another. Raises UserError."""
        size = sum(remote.sizes.values())
        free = shutil.disk_usage(self.folder.path).free
        if size > free:
            raise self._refusal(f"it has {size:,} bytes, and the disk of {self.folder.path} has {free:,} free")
        logger.info("downloading %s/ of %s (%.1f MB)", LAST_CHECKPOINT, self.repository, size / 1e6)
        for name in (name for name in remote.sizes if name.startswith(f"{RUN_FILES}/")):
            self._get(remote, name)
        self._compare_settings(remote, settings)
        parts = [""] if remote.best_step in (0, remote.step) else ["", f"{BEST}/"]
        for part in parts:
            files = self._listed(remote, part)
            for name in files:
                self._get(remote, f"{part}{name}")
            try:
                checkpoint.verify(remote.place / LAST_CHECKPOINT / part)
            except checkpoint.DamagedCheckpoint as damage:
                shutil.rmtree(self.folder.path / FOLDER, ignore_errors=True)
                raise self._refusal(f"the checkpoint on the Hub is damaged ({damage})") from None

    def install(self, remote: _Remote) -> None:
        """Move what was downloaded into the run folder; the checkpoint itself last, as it completes the rest."""
        source = remote.place / LAST_CHECKPOINT
        for name in ("metrics.csv", "speed.json", CONFIG_FILE):
            file, target = source / RUN_FILES / name, self.folder.path / name
            if file.is_file() and (name == "metrics.csv" or not target.exists()):
                write_atomically(target, file.read_bytes())
        if remote.best_step not in (0, remote.step):
            best = self._install(source / BEST, remote.best_step, self._listed(remote, f"{BEST}/"))
            checkpoint.link(self.folder.checkpoints, "best", best)
        last = self._install(source, remote.step, self._listed(remote, ""))
        if remote.best_step == remote.step:
            checkpoint.link(self.folder.checkpoints, "best", last)

    def _install(self, source: Path, step: int, names: list[str]) -> Path:
        def move(target: Path) -> None:
            for name in set(names) - {checkpoint.MANIFEST}:  # `write_checkpoint` makes the same manifest again
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(source / name, target / name)

        return checkpoint.write_checkpoint(self.folder.checkpoints, step, move)

    def _find(self) -> _Remote:
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            if "/" not in self.repository:
                self.repository = self.account.full_name(self.repository)
            check_name(self.repository)
            commit = self.account.api.model_info(self.repository, revision=self.revision).sha
            entries = self.account.api.list_repo_tree(self.repository, LAST_CHECKPOINT, recursive=True, revision=commit)
            found = {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
            sizes = {name.removeprefix(f"{LAST_CHECKPOINT}/"): size for name, size in found.items()}
            for name in (checkpoint.MANIFEST, STATE_FILE):
                if name not in sizes:
                    raise self._refusal(f"the checkpoint on the Hub is damaged ({name} is missing)")
            place = self._place(commit)
            remote = _Remote(self.repository, commit, place, sizes, step=0, best_step=0)
            state = json.loads(self._fetch(remote, STATE_FILE).read_text(encoding="utf-8"))
            remote.step, remote.best_step = int(state["step"]), int(state.get("best_step", 0))
            return remote
        except RepositoryNotFoundError:
            raise _NotThere(f"{self.account.endpoint} has no repository {self.repository} that you may read") from None
        except RevisionNotFoundError:
            raise self._refusal(f"{self.repository} has no revision {self.revision}") from None
        except LocalEntryNotFoundError as error:  # the client's word for a network that fails during a download
            raise self._failure(error) from None
        except EntryNotFoundError:
            raise _NotThere(f"{self.repository} contains no {LAST_CHECKPOINT}/") from None
        except (ValueError, KeyError, TypeError) as error:
            raise self._refusal(f"the checkpoint on the Hub is damaged ({cause(error)})") from None
        except UserError:
            raise
        except Exception as error:  # no network, an error of the server
            raise self._failure(error) from None

    def _place(self, commit: str) -> Path:
        """Return the folder for the files of a commit; those of another commit are deleted."""
        if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
            raise ValueError(f"{commit!r} is not a commit")
        for other in (self.folder.path / FOLDER).glob("*"):
            if other.name != commit:
                shutil.rmtree(other, ignore_errors=True)
        return self.folder.path / FOLDER / commit

    def _listed(self, remote: _Remote, part: str) -> list[str]:
        """Return the files in the manifest of the checkpoint, or of the best one (`part`), and the manifest itself.

        Raises:
            UserError: the manifest is damaged, or a path in it leads out of the checkpoint.
        """
        path = self._get(remote, f"{part}{checkpoint.MANIFEST}")
        try:
            names = list(json.loads(path.read_text(encoding="utf-8"))["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._refusal(f"the manifest of the checkpoint is damaged ({cause(error)})") from None
        for name in names:
            parts = PurePosixPath(name).parts
            if not parts or set(parts) & {"..", "/"} or "\\" in name or ":" in name or name != str(PurePosixPath(name)):
                raise self._refusal(f"the manifest of the checkpoint lists {name!r}, which is not a path in it")
            if f"{part}{name}" not in remote.sizes:
                raise self._refusal(f"the checkpoint on the Hub is damaged ({part}{name} is missing)")
        return [*names, checkpoint.MANIFEST]

    def _get(self, remote: _Remote, name: str) -> Path:
        """Download one file of last-checkpoint/, or continue or reuse an earlier download. Raises UserError."""
        if name not in remote.sizes:
            raise self._refusal(f"the checkpoint on the Hub is damaged ({name} is missing)")
        try:
            return answer(lambda: self._fetch(remote, name), seconds=float("inf"))
        except Exception as error:
            raise self._failure(error) from None

    def _fetch(self, remote: _Remote, name: str) -> Path:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        download: Any = self.account.api.hf_hub_download
        file = f"{LAST_CHECKPOINT}/{name}"
        return Path(download(remote.repository, file, revision=remote.commit, local_dir=remote.place))

    def _compare_settings(self, remote: _Remote, settings: Options) -> None:
        """Raise UserError if the settings would make another model, or the files of the run folder are damaged."""
        source = remote.place / LAST_CHECKPOINT / RUN_FILES
        try:
            if (source / "metrics.csv").is_file():
                read_metrics(source / "metrics.csv")
            text = (source / CONFIG_FILE).read_text(encoding="utf-8") if (source / CONFIG_FILE).is_file() else ""
            saved = yaml.safe_load(text) or {}
            changes = settings.changes_from(saved)["error"] if isinstance(saved, dict) else []
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise self._refusal(f"the files in {LAST_CHECKPOINT}/{RUN_FILES}/ are damaged ({cause(error)})") from None
        if changes:
            raise self._refusal(
                f"the run in {self.repository} was started with other settings: {'; '.join(changes)}. Restore them, or "
                "start a new run with --init_from"
            )

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"{self.flag}: {reason}")

    def _failure(self, error: Exception) -> UserError:
        if status_of(error) in (401, 403):
            return self._refusal(f"you may not read {self.repository} ({cause(error)}); use a token that may")
        return self.account.unreachable(error)


def _own_step(folder: RunFolder) -> int | None:
    """Return the step of the newest undamaged checkpoint in the run folder."""
    for saved in checkpoint.up_to_latest(folder.checkpoints):
        try:
            checkpoint.verify(saved)
        except checkpoint.DamagedCheckpoint:
            continue
        return checkpoint.step_of(saved)
    return None
