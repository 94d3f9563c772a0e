"""What of a run belongs on the Hub, by `--hub_strategy`: files for each path in the repository, with a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import yaml

from pipelines.tools.credentials import mask_credentials
from training.publishing.model_card import CARD_NAME, UNPUBLISHED
from training.publishing.public import settings_elsewhere
from training.run import checkpoint
from training.run.folder import RunFolder
from training.run.state import RunState

# What a run uploads, and when; the same strategies as in the Transformers Trainer.
HUB_STRATEGIES = {
    "end": "the final pipeline, once",
    "every_save": "the pipeline at every checkpoint",
    "checkpoint": "as every_save, and the newest checkpoint (optimizer state included) as last-checkpoint/",
    "all_checkpoints": "as checkpoint, and every checkpoint under checkpoints/",
}
# The folder in a pipeline that contains a LoRA adapter alone. It is uploaded instead of the pipeline, which has the
# weights of the base model as well.
ADAPTER_FOLDER = "lora"
LAST_CHECKPOINT, CHECKPOINTS = "last-checkpoint", "checkpoints"
# Folders in last-checkpoint/, which are not part of the checkpoint itself: files of the run folder that a resumed run
# continues, and the best checkpoint, unless it is the last one.
RUN_FILES, BEST = "run", "best"
COPIED_RUN_FILES = ("metrics.csv", "speed.json")
CONFIG_FILE = "config.yaml"
TRAINING_STATE = ("*optimizer*", "*grad_scaler*", "*random_state*", "*trainer_state*", ".*", "*/.*")
SECRETS = (".env*", "*/.env*", ".netrc", "*/.netrc", "*.pem", "*.key", "id_rsa*", "*/id_rsa*", ".git/*", "wandb/*")


@dataclass
class Content:
    """The files that belong to one path in the repository.

    Attributes:
        path_in_repo: folder in the repository; "" is its root.
        source: the folder in the run folder that they come from, for messages.
        message: the commit message.
        fingerprint: a text that changes when the content does.
        fixed: files that never change, by their name below `path_in_repo`; hard links can replace copies.
        changing: files that may change during the upload, and are therefore copied.
        written: texts of files that exist only in the repository.
    """

    path_in_repo: str
    source: Path
    message: str
    fingerprint: str
    fixed: dict[str, Path] = field(default_factory=dict)
    changing: dict[str, Path] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)


def contents(folder: RunFolder, strategy: str, model_id: str) -> Iterator[Content]:
    """Yield what should be in the repository now: of a complete run its pipeline, and what the strategy adds."""
    newest = checkpoint.newest(folder.checkpoints)
    if folder.pipeline.is_dir() and (newest is None or folder.is_exported(checkpoint.step_of(newest))):
        yield pipeline_content(folder.pipeline, f"{folder.name}: the final pipeline", model_id)
    elif newest is not None and strategy != "end":
        yield from pipeline_of_checkpoint(newest)
    if newest is not None:
        yield from checkpoint_contents(folder, newest, strategy)
    if strategy == "all_checkpoints":
        for other in checkpoint.up_to_latest(folder.checkpoints):
            if other != newest:
                yield whole_checkpoint(other)


def checkpoint_contents(folder: RunFolder, saved: Path, strategy: str) -> Iterator[Content]:
    """Yield what the strategy uploads of a new checkpoint besides its pipeline."""
    if strategy in ("checkpoint", "all_checkpoints"):
        yield last_checkpoint(folder, saved)
    if strategy == "all_checkpoints":
        yield whole_checkpoint(saved)


def pipeline_content(pipeline: Path, message: str, model_id: str) -> Content:
    """Return the final pipeline, or its adapter alone if it has one; the model card names the repository."""
    pipeline = published_part(pipeline)
    files = _files(pipeline, leave_out=TRAINING_STATE)
    written = {}
    if CARD_NAME in files:
        card = files[CARD_NAME].read_text(encoding="utf-8")
        if f'"{UNPUBLISHED}"' in card:
            written[CARD_NAME] = card.replace(f'"{UNPUBLISHED}"', f'"{model_id}"')
    changing = {name: path for name, path in files.items() if name not in written}
    return Content("", pipeline, message, _digest(files), changing=changing, written=written)


def pipeline_of_checkpoint(saved: Path) -> Iterator[Content]:
    """Yield the pipeline in a checkpoint, if it has one, or its adapter alone."""
    if (saved / "pipeline").is_dir():
        part = published_part(saved / "pipeline")
        files = _files(part, leave_out=TRAINING_STATE)
        yield Content("", part, saved.name, f"{manifest_digest(saved)} pipeline", fixed=files)


def published_part(pipeline: Path) -> Path:
    """Return the folder that is uploaded: the adapter alone if the pipeline has one, and the pipeline otherwise."""
    return adapter if (adapter := pipeline / ADAPTER_FOLDER).is_dir() else pipeline


def last_checkpoint(folder: RunFolder, saved: Path) -> Content:
    """Return `last-checkpoint/`: a checkpoint with everything that another machine needs to resume from it."""
    content = _checkpoint(saved, LAST_CHECKPOINT)
    best = folder.checkpoints / f"step-{RunState.read(saved).best_step:08d}"
    if best.is_dir() and best.name != saved.name:
        inner = _checkpoint(best, LAST_CHECKPOINT)
        content.fixed |= {f"{BEST}/{name}": path for name, path in inner.fixed.items()}
        content.written |= {f"{BEST}/{name}": text for name, text in inner.written.items()}
        content.fingerprint += f" {inner.fingerprint}"
    for name in COPIED_RUN_FILES:
        if (folder.path / name).is_file():
            content.changing[f"{RUN_FILES}/{name}"] = folder.path / name
    config = settings_elsewhere(mask_credentials(folder.saved_config() or {}))
    content.written[f"{RUN_FILES}/{CONFIG_FILE}"] = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return content


def whole_checkpoint(saved: Path) -> Content:
    """Return a checkpoint for `checkpoints/`."""
    return _checkpoint(saved, f"{CHECKPOINTS}/{saved.name}")


def folder_content(folder: Path, message: str, path_in_repo: str) -> Content:
    """Return any folder as it is now, without training state."""
    files = _files(folder, leave_out=TRAINING_STATE)
    return Content(path_in_repo.strip("/"), folder, message, _digest(files), changing=files)


def _checkpoint(saved: Path, path_in_repo: str) -> Content:
    """Return a checkpoint without its copy of config.yaml, which has local paths; the manifest is adapted."""
    content = Content(path_in_repo, saved, f"{saved.name}: checkpoint", manifest_digest(saved), fixed=_files(saved))
    if content.fixed.pop(CONFIG_FILE, None) is not None:
        manifest = json.loads(content.fixed.pop(checkpoint.MANIFEST).read_text(encoding="utf-8"))
        manifest["files"].pop(CONFIG_FILE, None)
        content.written[checkpoint.MANIFEST] = json.dumps(manifest, indent=1) + "\n"
    return content


def _files(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    patterns = (*leave_out, *SECRETS)
    return {name: path for name, path in files.items() if not any(fnmatch(name, pattern) for pattern in patterns)}


def manifest_digest(saved: Path) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which contains the SHA-256 of all its files."""
    return hashlib.sha256((saved / checkpoint.MANIFEST).read_bytes()).hexdigest()


def _digest(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in files.items():
        with path.open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
