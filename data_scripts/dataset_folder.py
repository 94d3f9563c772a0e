"""Write a dataset's folder completely or not at all: it is written under another name and renamed when complete."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError
from training.core.files import fsync_folder, write_json

MANIFEST = "manifest.json"


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` to write into: a killed run then leaves no incomplete dataset in `folder`.

    Raises:
        UserError: the folder cannot be created.
    """
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(folder: Path, kind: str, pattern: str, overwrite: bool) -> None:
    """Check that `folder` is missing or empty, or that it holds an earlier dataset that may be set aside.

    Args:
        folder: the folder to write.
        kind: what the dataset is called in messages, such as "an imagefolder".
        pattern: glob pattern of files by which an earlier dataset is recognized.
        overwrite: whether an earlier dataset may be set aside.

    Raises:
        UserError: `folder` holds something else, or an earlier dataset and `overwrite` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; choose a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any(folder.glob(pattern)):
        raise UserError(f"--output_dir {folder} holds something that is not {kind}; choose another folder")
    if not overwrite:
        raise UserError(
            f"--output_dir {folder} already holds {kind}; choose another folder, or set the existing one aside with "
            "--overwrite true"
        )


def put_in_place(partial: Path, folder: Path) -> Path | None:
    """Rename `partial` to `folder`. An earlier dataset there is renamed, not deleted; return its new path, or None."""
    aside, folder = None, folder.absolute()
    if folder.is_dir() and any(folder.iterdir()):
        names = (folder.with_name(f"{folder.name}_old_{number}") for number in itertools.count(1))
        aside = folder.rename(next(name for name in names if not name.exists()))
    partial.rename(folder)
    fsync_folder(folder.parent)
    return aside


def write_manifest(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings that the dataset was made with and the sizes of its files.

    The manifest must be written last, because its presence marks the dataset as complete.
    """
    sizes = {f"data/{path.name}": path.stat().st_size for path in sorted((folder / "data").iterdir())}
    write_json(folder / MANIFEST, {"settings": settings, "files": sizes})


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings that the dataset in `folder` was made with, or None if no complete one exists."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return manifest["settings"] if whole else None
    except (json.JSONDecodeError, KeyError, TypeError, FileNotFoundError):
        return None  # the manifest is of another kind, or a file is missing
