"""Checkpoints that are written atomically: into a temporary folder, which gets a manifest and is then renamed.

Older checkpoints are deleted only after that.

checkpoints/step-00001000/
    manifest.json               names, sizes and SHA-256 of every other file
    trainer_state.json          step, running sums, best value, …
    phase_<name>.safetensors    weights          optimizer_<name>.safetensors + .json
    ema.safetensors             EMA weights      scaler.json   the gradient scaler of fp16
    pipeline/                   the public pipeline, with the EMA weights
checkpoints/latest, best        links
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.tools.cli import UserError
from training.core.files import fsync_folder, write_json
from training.core.options import Options, option

logger = logging.getLogger("halftone")

MANIFEST = "manifest.json"
WRITING = ".writing-"
REPLACED = ".replaced-"
DELETING = ".deleting-"
LINKING = ".tmp"


@dataclass
class CheckpointConfig(Options):
    """Options for resuming from checkpoints and keeping them."""

    resume_from_checkpoint: str = option("latest", on_resume="free")
    """Checkpoint to resume from: latest, best or the path of a checkpoint; none fails if the folder contains a run
    (see --overwrite)"""
    checkpoints_total_limit: int = option(2, on_resume="free", at_least=1)
    """Maximum number of checkpoints to keep besides the best one, at least 1; the oldest are deleted"""


class DamagedCheckpoint(Exception):
    """Raised for a checkpoint whose files do not match its manifest."""


def write_checkpoint(checkpoints: Path, step: int, write_files: Callable[[Path], None]) -> Path:
    """Write a checkpoint with `write_files(folder)`, link it as `latest`, and return its folder.

    The files are written into a temporary folder, which gets a manifest and is renamed when it is complete. An existing
    checkpoint of the same step is replaced only then.

    Raises:
        OSError: the checkpoint could not be written, e.g. because the disk is full; existing checkpoints are unchanged.
    """
    from safetensors import SafetensorError

    final = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / f"{WRITING}{final.name}"
    clear_leftovers(checkpoints)
    temporary.mkdir()
    try:
        write_files(temporary)
        _seal(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(str(error)) from error
        raise
    if final.exists():
        replaced = checkpoints / f"{REPLACED}{final.name}"
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    fsync_folder(checkpoints)
    link(checkpoints, "latest", final)
    return final


def clear_leftovers(checkpoints: Path) -> None:
    """Clean up after a killed process: delete what it was writing or deleting, and restore what it was replacing."""
    for replaced in checkpoints.glob(f"{REPLACED}*"):
        original = checkpoints / replaced.name.removeprefix(REPLACED)
        if not original.exists():
            replaced.rename(original)
    for prefix in (WRITING, REPLACED, DELETING):
        for leftover in checkpoints.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    for unlinked in checkpoints.glob(f".*{LINKING}*"):
        unlinked.unlink()


def link(checkpoints: Path, name: str, target: Path) -> None:
    """Make `latest` or `best` a link to a checkpoint, atomically."""
    temporary = checkpoints / f".{name}{LINKING}{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, checkpoints / name)


def relink_best(checkpoints: Path, step: int) -> None:
    """Link `best` to the checkpoint of `step` if it exists: a process may be killed between writing and linking it."""
    folder = checkpoints / f"step-{step:08d}"
    if folder.is_dir() and (checkpoints / "best").resolve() != folder.resolve():
        link(checkpoints, "best", folder)


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all checkpoints except `best` and the `keep` newest ones up to `latest`.

    Checkpoints of later steps than `latest` are left over from before the run returned to an older checkpoint.
    """
    best = (checkpoints / "best").resolve()
    kept = list(_up_to_latest(checkpoints))[:keep]
    for folder in list(_by_step(checkpoints)):
        if folder not in kept and folder.resolve() != best:
            # Renamed first, so that a process killed while deleting does not leave an incomplete checkpoint.
            deleting = checkpoints / f"{DELETING}{folder.name}"
            folder.rename(deleting)
            shutil.rmtree(deleting, ignore_errors=True)


def verify(folder: Path) -> None:
    """Raise DamagedCheckpoint with the reason unless every file exists with the size and SHA-256 of the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"its {MANIFEST} cannot be read ({error})") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        if path.stat().st_size != expected["size"]:
            raise DamagedCheckpoint(f"{name} has {path.stat().st_size} bytes instead of {expected['size']}")
        if _sha256(path) != expected["sha256"]:
            raise DamagedCheckpoint(f"the contents of {name} changed after it was written")


def find_checkpoint(checkpoints: Path, name: str) -> Path | None:
    """Return the verified checkpoint to resume from; None if the run has not saved any.

    Args:
        name: `latest` (the newest checkpoint that is not damaged; damaged ones are skipped with a warning), `best`, or
            the path of a checkpoint.

    Raises:
        UserError: `best` or the path is missing or damaged, or all checkpoints are damaged.
    """
    clear_leftovers(checkpoints)
    if name == "latest":
        return _newest_undamaged(checkpoints)
    folder = checkpoints / "best" if name == "best" else Path(name)
    if not folder.is_dir():
        existing = ", ".join(f.name for f in _by_step(checkpoints)) or "none"
        raise UserError(
            f"--resume_from_checkpoint {name}: {folder} does not exist; "
            f"choose another checkpoint (in this run: {existing})"
        )
    try:
        verify(folder)
    except DamagedCheckpoint as damage:
        raise UserError(
            f"--resume_from_checkpoint {name}: the checkpoint is damaged ({damage}); "
            "use another checkpoint, or `latest` for the newest undamaged one"
        ) from None
    return folder.resolve()


def _newest_undamaged(checkpoints: Path) -> Path | None:
    damaged = []
    for folder in _up_to_latest(checkpoints):
        try:
            verify(folder)
        except DamagedCheckpoint as damage:
            logger.warning("checkpoint %s is damaged (%s); trying the previous one", folder.name, damage)
            damaged.append(folder.name)
            continue
        return folder
    if damaged:
        raise UserError(
            f"every checkpoint in {checkpoints} is damaged ({', '.join(damaged)}); "
            "restore one from a backup, or start again with --overwrite (the old run is kept in another folder)"
        )
    return None


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def save_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path, device=device)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # Modules may share a tensor under two names (tied weights), but safetensors does not save shared memory.
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        owned[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(owned, path)


def _by_step(checkpoints: Path) -> Iterator[Path]:
    """Yield the checkpoint folders, newest first, by the step in the name."""
    folders = [f for f in checkpoints.glob("step-*") if f.name.removeprefix("step-").isdigit()]
    yield from sorted(folders, key=lambda f: int(f.name.removeprefix("step-")), reverse=True)


def _up_to_latest(checkpoints: Path) -> Iterator[Path]:
    """Yield the checkpoint folders up to `latest`, newest first.

    Checkpoints of later steps are left over from before the run returned to an older checkpoint.
    """
    latest = (checkpoints / "latest").resolve()
    folders = list(_by_step(checkpoints))
    names = [folder.name for folder in folders]
    yield from folders[names.index(latest.name) if latest.name in names else 0 :]


def _seal(folder: Path) -> None:
    """Flush all files to the disk and write the manifest."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {"files": files})
    for sub in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        fsync_folder(sub)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
