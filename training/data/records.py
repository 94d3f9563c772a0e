"""What an earlier start found out about data that have not changed since: their rows, checks and fingerprints.

A record is a small file in the cache folder of `datasets`. Its key contains the names, sizes and modification times of
all files, so that a change of any file makes a new record. Records only save time: without one, all is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.core.files import read_json, write_json

if TYPE_CHECKING:
    from datasets import Dataset


def read_record(kind: str, key: Any) -> Any:
    """Return the recorded value; None if there is none."""
    return read_json(cache_file(kind, key))


def write_record(kind: str, key: Any, value: Any) -> None:
    """Record a value that can be written as JSON, unless the cache folder cannot be written."""
    file = cache_file(kind, key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, value)


def files_state(path: Path, *others: Path) -> str:
    """Return a hash of the names, sizes and modification times of files, or of all files in a folder."""
    entries: list[tuple[str, int, int]] = []
    folders = [str(path)] if path.is_dir() else []
    if not folders:
        entries += [_entry(str(file), file.stat()) for file in (path, *others)]
    while folders:
        with os.scandir(folders.pop()) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    with contextlib.suppress(OSError):  # a link to nothing, or in a loop
                        entries.append(_entry(entry.path, entry.stat()))
    return _hash([os.path.abspath(path), sorted(entries)])


def remote_files_state(files: Sequence[tuple[str, int, str]]) -> str:
    """Return a hash of the URLs, sizes and versions of remote files, as `files_state` does of local ones."""
    return _hash(sorted(files))


def rows_key(dataset: Dataset, source_state: str | None) -> str | None:
    """Return a key that identifies the stored rows of `dataset`; None if they are not in files.

    Args:
        source_state: `files_state` of the folder with the images, or `remote_files_state`; None if the rows contain
            them.
    """
    files = [file["filename"] for file in dataset.cache_files]
    if not files:
        return None
    digest = hashlib.sha256(_hash([source_state, [_entry(file, os.stat(file)) for file in files]]).encode())
    if dataset._indices is not None:  # `datasets` stores a selection of rows here
        digest.update(dataset._indices.column(0).to_numpy().tobytes())
    return digest.hexdigest()


def _entry(path: str, stat: os.stat_result) -> tuple[str, int, int]:
    return path, stat.st_size, stat.st_mtime_ns


def cache_file(kind: str, key: Any, suffix: str = ".json") -> Path:
    """Return the file of a record; other modules may keep larger content there."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "halftone" / f"{kind}-{_hash(key)[:32]}{suffix}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
