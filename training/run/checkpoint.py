"""Checkpoints that are whole or not there: written aside, checked by a manifest, renamed, and only then pruned.

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
    """Which checkpoint a run resumes from, and how many are kept."""

    resume_from_checkpoint: str = option("latest", on_resume="free")
    """`latest`, `best`, `none`, or the path of a checkpoint."""
    checkpoints_total_limit: int = option(2, on_resume="free", at_least=1)
    """Number of the newest checkpoints that are kept, beside `best`."""


class DamagedCheckpoint(Exception):
    """A checkpoint folder whose files are not what its manifest says."""


def write_checkpoint(checkpoints: Path, step: int, write_files: Callable[[Path], None]) -> Path:
    """Let `write_files(folder)` fill a temporary folder; seal, rename and link it as `latest`.

    A folder of the same step is replaced only once the new one is whole.

    Raises:
        OSError: nothing could be written (a full disk); what was there before is untouched.
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
    """Tidy up after a killed process: delete what it was writing or deleting, restore what it was replacing."""
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
    """Point `latest` or `best` at a checkpoint, atomically."""
    temporary = checkpoints / f".{name}{LINKING}{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, checkpoints / name)


def relink_best(checkpoints: Path, step: int) -> None:
    """Point `best` at the checkpoint of `step` if it is there: a kill may have come between writing and linking it."""
    folder = checkpoints / f"step-{step:08d}"
    if folder.is_dir() and (checkpoints / "best").resolve() != folder.resolve():
        link(checkpoints, "best", folder)


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the `keep` newest and `best`; those after `latest` are of a branch that was given up."""
    best = (checkpoints / "best").resolve()
    kept = list(_up_to_latest(checkpoints))[:keep]
    for folder in list(_by_step(checkpoints)):
        if folder not in kept and folder.resolve() != best:
            # Renamed first: a kill in the middle of deleting must not leave half a checkpoint under a real name.
            doomed = checkpoints / f"{DELETING}{folder.name}"
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def verify(folder: Path) -> None:
    """Raise DamagedCheckpoint, saying what is wrong, unless every file is there with its size and SHA-256."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"its {MANIFEST} cannot be read ({error})") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        if path.stat().st_size != expected["size"]:
            raise DamagedCheckpoint(f"{name} has {path.stat().st_size} bytes instead of {expected['size']}")
        if _sha256(path) != expected["sha256"]:
            raise DamagedCheckpoint(f"{name} has other contents than when it was written")


def find_checkpoint(checkpoints: Path, wanted: str) -> Path | None:
    """The checkpoint to go on from, verified; None when there is none.

    `latest`: the last one written that is whole, damaged ones skipped with a warning; `best`; or a path, which must be
    whole.

    Raises:
        UserError: `best` or a path that is missing or damaged, or checkpoints that are all damaged.
    """
    clear_leftovers(checkpoints)
    if wanted == "latest":
        return _newest_whole(checkpoints)
    folder = checkpoints / "best" if wanted == "best" else Path(wanted)
    if not folder.is_dir():
        have = ", ".join(f.name for f in _by_step(checkpoints)) or "none"
        raise UserError(f"--resume_from_checkpoint {wanted}: {folder} is not there (checkpoints in this run: {have})")
    try:
        verify(folder)
    except DamagedCheckpoint as damage:
        raise UserError(
            f"--resume_from_checkpoint {wanted}: the checkpoint is damaged, {damage}; "
            "name another, or `latest` for the newest whole one"
        ) from None
    return folder.resolve()


def _newest_whole(checkpoints: Path) -> Path | None:
    damaged = []
    for folder in _up_to_latest(checkpoints):
        try:
            verify(folder)
        except DamagedCheckpoint as damage:
            logger.warning("checkpoint %s is damaged, %s; trying the one before it", folder.name, damage)
            damaged.append(folder.name)
            continue
        return folder
    if damaged:
        raise UserError(
            f"every checkpoint in {checkpoints} is damaged ({', '.join(damaged)}); "
            "restore one from a backup, or start anew with --overwrite (the old run is set aside)"
        )
    return None


def load_json(path: Path) -> Any:
    return json.loads(path.read_text())


def save_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1))


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path, device=device)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # Modules may share a tensor under two names; safetensors wants each to own its memory.
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        owned[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(owned, path)


def _by_step(checkpoints: Path) -> Iterator[Path]:
    """Newest first, by the step in the name."""
    folders = [f for f in checkpoints.glob("step-*") if f.name.removeprefix("step-").isdigit()]
    yield from sorted(folders, key=lambda f: int(f.name.removeprefix("step-")), reverse=True)


def _up_to_latest(checkpoints: Path) -> Iterator[Path]:
    """Newest first, without those of later steps than `latest`: a run that went back to an older one left them."""
    latest = (checkpoints / "latest").resolve()
    folders = list(_by_step(checkpoints))
    names = [folder.name for folder in folders]
    yield from folders[names.index(latest.name) if latest.name in names else 0 :]


def _seal(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {"files": files})
    for sub in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        fsync_folder(sub)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
