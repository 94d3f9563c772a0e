"""A dataset's folder that is whole or not there: written beside its place, and renamed when all is in it."""

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
    """An empty folder beside `folder` to write into; a killed run leaves no half dataset in `folder` itself.

    Raises:
        UserError: it cannot be made.
    """
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}); name a folder that can") from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(folder: Path, kind: str, pattern: str, overwrite: bool) -> None:
    """Whether `folder` may be written: it is empty, or holds what `pattern` finds, and is to be set aside.

    Raises:
        UserError: it holds something else, or --overwrite was not given.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any(folder.glob(pattern)):
        raise UserError(f"--output_dir {folder} holds something that is not {kind}; name another folder")
    if not overwrite:
        raise UserError(f"--output_dir {folder} holds {kind}; name another folder, or set it aside: --overwrite true")


def put_in_place(partial: Path, folder: Path) -> Path | None:
    """Rename `partial` to `folder`; what was there is renamed, not deleted. Its new name, if there was anything."""
    aside, folder = None, folder.absolute()
    if folder.is_dir() and any(folder.iterdir()):
        names = (folder.with_name(f"{folder.name}_old_{number}") for number in itertools.count(1))
        aside = folder.rename(next(name for name in names if not name.exists()))
    partial.rename(folder)
    fsync_folder(folder.parent)
    return aside


def write_manifest(folder: Path, settings: dict[str, Any]) -> None:
    """Record what the dataset was made from, and its files' sizes: written last, so its presence means completeness."""
    sizes = {f"data/{path.name}": path.stat().st_size for path in sorted((folder / "data").iterdir())}
    write_json(folder / MANIFEST, {"settings": settings, "files": sizes})


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What the dataset in `folder` was made from; None when there is no complete one of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return manifest["settings"] if whole else None
    except (json.JSONDecodeError, KeyError, TypeError, FileNotFoundError):
        return None  # some other manifest, or a file is gone: not a dataset of ours that can be used
