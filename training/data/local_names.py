"""What the name of a source stands for on this machine: files, a folder of images, or nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.tools.cli import UserError, located
from pipelines.tools.credentials import mask_credentials
from pipelines.tools.files import image_suffixes
from training.data.archives import is_archive
from training.data.folder_layout import METADATA_NAMES
from training.data.shards.remote import is_remote
from training.data.table_files import matching_files, readme_defines_splits


class Found(NamedTuple):
    """What the name of a source stands for on this machine."""

    path: Path
    files: list[Path]
    """The files, if the name is a pattern of files"""
    local: bool
    """Whether there is anything; if not, the name is a URL or that of a dataset on the Hub"""


def found_here(name: str, base: str, imagefolder: bool) -> Found:
    """Return what the name of a source stands for on this machine.

    Args:
        base: the folder that a relative path begins at.
        imagefolder: whether the name was given by --train_data_dir.

    Raises:
        UserError: it is not on this machine, and cannot be elsewhere.
    """
    path = Path(base, os.path.expanduser(name))
    files = [] if path.exists() else matching_files(path)
    if files or path.exists():
        return Found(path, files, local=True)
    if is_remote(name) and imagefolder:
        raise UserError(
            f"--train_data_dir takes a folder on this machine, and {mask_credentials(name)} is a URL; give it with "
            "--dataset_name and --streaming true"
        )
    if not is_remote(name) and (imagefolder or _looks_local(name)):
        raise UserError(f"dataset {located(name)} does not exist; check the path given by {flag_of(imagefolder)}")
    return Found(path, [], local=False)


def flag_of(imagefolder: bool) -> str:
    return "--train_data_dir" if imagefolder else "--dataset_name"


def _looks_local(name: str) -> bool:
    """Return whether a name that does not exist here looks like a path, so that the Hub need not be asked."""
    path = Path(name)
    in_folder_here = len(path.parts) > 1 and path.parent.is_dir()
    return (
        path.is_absolute() or name.startswith((".", "~")) or bool(path.suffix) or len(path.parts) > 2 or in_folder_here
    )


def is_image_folder(path: Path) -> bool:
    """Return whether a folder is one of images, and not of tables that hold images."""
    names = [name for _, _, files in os.walk(path) for name in files if not name.startswith(".")]
    suffixes = Counter(os.path.splitext(name)[1].lower() for name in _without_descriptions(names))
    images = sum(suffixes[suffix] for suffix in image_suffixes()) + sum(map(is_archive, names))
    if set(METADATA_NAMES).intersection(names):
        return True
    if suffixes[".parquet"] or suffixes[".arrow"] or readme_defines_splits(path):
        return False
    return images > sum(suffixes[suffix] for suffix in (".json", ".jsonl", ".csv"))


def _without_descriptions(names: Sequence[str]) -> list[str]:
    """Return the names without those of files that describe an archive: 00000_stats.json beside 00000.tar."""
    shards = tuple(name.partition(".")[0] for name in names if is_archive(name))
    return [name for name in names if is_archive(name) or not name.startswith(shards)] if shards else list(names)
