"""Checkpoints that are written atomically: into a temporary folder, which gets a manifest and is then renamed.

Older checkpoints are deleted only after that.

checkpoints/step-00001000/
    manifest.json               names, sizes and SHA-256 of every other file
    trainer_state.json          step, running sums, best value, …
    config.yaml                 the settings of the run, in case its own config.yaml is lost
    phase_<name>.safetensors    weights          optimizer_<name>.safetensors + .json
    ema.safetensors             EMA weights      scaler.json   the gradient scaler of fp16
    pipeline/                   the public pipeline, with the EMA weights
checkpoints/latest, best        links, or files that contain the name of a checkpoint
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from pipelines.tools.checkpoint_links import MANIFEST, STATE_FILE, follow_links, linked_checkpoint, steps_in
from pipelines.tools.cli import UserError
from training.core.files import WRITING, fsync_folder, read_json_object, replacing_folder, write_atomically, write_json
from training.core.options import Options, option

logger = logging.getLogger("halftone")

DELETING = ".deleting-"
TENSORS = ".safetensors"

Contents = dict[str, dict[str, Any]]
"""Contents of files by their names: the tensors of a .safetensors file, and the values of a .json file."""


@dataclass
class CheckpointConfig(Options):
    """Options for resuming from checkpoints and keeping them."""

    help_group = "Saving and measuring"

    resume_from_checkpoint: str = option("latest", on_resume="free")
    """Checkpoint to resume from: latest, best or the path of a checkpoint; hub or the name of a Hub repository
    (user/name, or user/name@revision) to download the checkpoint that --hub_strategy checkpoint uploaded; none fails
    if the folder contains a run (see --overwrite)"""
    checkpoints_total_limit: int = option(2, on_resume="free", at_least=1)
    """Maximum number of checkpoints to keep besides the best one, at least 1; the oldest are deleted"""


class DamagedCheckpoint(Exception):
    """Raised for a checkpoint whose files do not match its manifest, or have other contents than a checkpoint has."""


def write_checkpoint(checkpoints: Path, step: int, write_files: Callable[[Path], None]) -> Path:
    """Write a checkpoint with `write_files(folder)`, link it as `latest`, and return its folder.

    The files are written into a temporary folder, which gets a manifest and is renamed when it is complete. An existing
    checkpoint of the same step is replaced only then.

    Raises:
        OSError: the checkpoint could not be written, e.g. because the disk is full; existing checkpoints are unchanged.
    """
    final = checkpoint_of_step(checkpoints, step)
    with replacing_folder(final) as temporary:
        write_files(temporary)
        _seal(temporary)
    try:
        link(checkpoints, "latest", final)
    except OSError:
        if steps_in(checkpoints)[0] != final:
            raise
        (checkpoints / "latest").unlink(missing_ok=True)  # without a link, the newest checkpoint is the latest
    return final


def checkpoint_of_step(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def link(checkpoints: Path, name: str, target: Path) -> None:
    """Make `latest` or `best` lead to a checkpoint, atomically.

    A folder of this name, which a program that copied the run has made of the link, is renamed.
    """
    place = checkpoints / name
    if place.is_dir() and not place.is_symlink():
        set_aside(place)
    temporary = checkpoints / f"{WRITING}{os.getpid()}-{name}"
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name)
        os.replace(temporary, place)
    except (OSError, NotImplementedError, AttributeError):  # no symbolic links here: exFAT, SMB, Windows
        temporary.unlink(missing_ok=True)
        write_name(place, target)
    else:
        fsync_folder(checkpoints)


def write_name(place: Path, target: Path) -> None:
    """Write what `latest` or `best` is without symbolic links: a file that contains the name of the checkpoint."""
    write_atomically(place, f"{target.name}\n")


def set_aside(folder: Path) -> Path:
    """Rename a folder in `checkpoints/` that is in the way, and return its new path."""
    number = 1
    while os.path.lexists(folder.with_name(f"{folder.name}.old-{number}")):
        number += 1
    return folder.rename(folder.with_name(f"{folder.name}.old-{number}"))


def newest(checkpoints: Path) -> Path | None:
    """Return the checkpoint `latest`, or else the one with the highest step; None if there is none."""
    return next(iter(up_to_latest(checkpoints)), None)


def relink_best(checkpoints: Path, step: int) -> None:
    """Link `best` to the checkpoint of `step` if it exists: a process may be killed between writing and linking it."""
    folder = checkpoint_of_step(checkpoints, step)
    if folder.is_dir() and linked_checkpoint(checkpoints, "best") != folder:
        link(checkpoints, "best", folder)


def step_back(checkpoints: Path, step: int) -> Path | None:
    """If `latest` is of `step` or a later one, link it to the newest earlier checkpoint and return that.

    Returns None if `latest` is earlier already, or if no earlier checkpoint exists.
    """
    latest = linked_checkpoint(checkpoints, "latest")
    earlier = [folder for folder in up_to_latest(checkpoints) if step_of(folder) < step]
    if latest is None or not earlier or latest == earlier[0]:
        return None
    link(checkpoints, "latest", earlier[0])
    return earlier[0]


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all checkpoints except `best` and the `keep` newest ones up to `latest`.

    Checkpoints of later steps than `latest` are left over from before the run returned to an older checkpoint.
    """
    best = linked_checkpoint(checkpoints, "best")
    kept = up_to_latest(checkpoints)[:keep]
    for folder in steps_in(checkpoints):
        if folder not in kept and folder != best:
            delete(folder)


def delete(folder: Path) -> None:
    """Delete a folder in `checkpoints/`, which is renamed first: a killed process leaves no incomplete checkpoint."""
    deleting = folder.with_name(f"{DELETING}{folder.name}")
    shutil.rmtree(deleting, ignore_errors=True)
    folder.rename(deleting)
    shutil.rmtree(deleting, ignore_errors=True)


def verify(folder: Path) -> None:
    """Raise DamagedCheckpoint with the reason unless every file exists with the size and SHA-256 of the manifest."""
    for name, (size, sha256) in _listed_files(folder).items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        try:
            if path.stat().st_size != size:
                raise DamagedCheckpoint(f"{name} has {path.stat().st_size} bytes instead of {size}")
            if _sha256(path) != sha256:
                raise DamagedCheckpoint(f"the contents of {name} changed after it was written")
        except OSError as error:
            raise DamagedCheckpoint(f"{name} cannot be read ({error.strerror})") from None


def _listed_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 by path of each file in the manifest. Paths have forward slashes on every system."""
    files = (read_json_object(folder / MANIFEST) or {}).get("files")
    if not isinstance(files, dict) or not files:
        raise DamagedCheckpoint(f"its {MANIFEST} is missing, damaged or empty")
    listed = {}
    for name, entry in files.items():
        path = PurePosixPath(name.replace("\\", "/"))  # earlier versions wrote backslashes on Windows
        if path.is_absolute() or ".." in path.parts or ":" in name:
            raise DamagedCheckpoint(f"its {MANIFEST} lists {name!r}, which is outside the checkpoint")
        match entry:
            case {"size": int(size), "sha256": str(sha256)}:
                listed[str(path)] = (size, sha256)
            case _:
                raise DamagedCheckpoint(f"its {MANIFEST} has no size and SHA-256 of {name!r}")
    if STATE_FILE not in listed:
        raise DamagedCheckpoint(f"its {MANIFEST} does not list {STATE_FILE}")
    return listed


def find_checkpoint(checkpoints: Path, name: str) -> Path | None:
    """Return the verified checkpoint to resume from; None if the run has not saved any.

    Args:
        name: `latest` (the newest checkpoint that is not damaged; damaged ones are skipped with a warning), `best`, or
            the path of a checkpoint.

    Raises:
        UserError: `best` or the path is missing or damaged, or all checkpoints are damaged.
    """
    if name == "latest":
        return _newest_undamaged(checkpoints)
    folder = linked_checkpoint(checkpoints, "best") if name == "best" else follow_links(name)
    if folder is None or not folder.is_dir():
        existing = ", ".join(f.name for f in steps_in(checkpoints)) or "none"
        raise UserError(
            f"--resume_from_checkpoint {name}: {os.path.abspath(folder or checkpoints / name)} does not exist; "
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


def is_undamaged(folder: Path) -> bool:
    try:
        verify(folder)
    except DamagedCheckpoint:
        return False
    return True


def _newest_undamaged(checkpoints: Path) -> Path | None:
    damaged = []
    for folder in up_to_latest(checkpoints):
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


def save_contents(contents: Contents, folder: Path) -> None:
    """Write the files with these contents into the folder of a checkpoint."""
    for name, content in contents.items():
        save = save_tensors if name.endswith(TENSORS) else save_json
        save(content, folder / name)


def copy_contents(contents: Contents) -> Contents:
    """Return a copy in the memory of the CPU, which later steps do not change."""
    return {
        name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in content.items()}
        if name.endswith(TENSORS)
        else copy.deepcopy(content)
        for name, content in contents.items()
    }


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def save_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path, device=device)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # Modules may share a tensor under two names (tied weights), but safetensors does not save shared memory.
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        owned[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(owned, path)


def up_to_latest(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders up to `latest`, newest first.

    Checkpoints of later steps are left over from before the run returned to an older checkpoint.
    """
    latest, folders = linked_checkpoint(checkpoints, "latest"), steps_in(checkpoints)
    return folders[folders.index(latest) if latest in folders else 0 :]


def _seal(folder: Path) -> None:
    """Write the manifest."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"files": files})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
