"""Folders that the project's scripts make: whether one is complete, and the lock of the process that makes it.

A folder that exists is not necessarily complete: it may have been copied in part, its disk may have been full, or a
power cut may have emptied its files. `incomplete` is the only place that decides this.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from training.core.files import read_json, read_json_object
from training.core.locks import FolderLock

MANIFEST = "manifest.json"
CACHE_MANIFEST = "cache.json"
PIPELINE_INDEX = "model_index.json"
_LAST_FILES = (MANIFEST, CACHE_MANIFEST, PIPELINE_INDEX, "tokenizer.json")
_PARQUET_MAGIC = b"PAR1"
# To ask a network file system for the size of a file takes up to a millisecond.
SHARDS_LOOKED_AT = 4096


def incomplete(path: str | os.PathLike[str], script: str) -> str | None:
    """Return what is wrong with a folder that `script` makes, such as "is missing"; None if it is complete.

    Args:
        path: the folder, or the file in it that is written last.
        script: path or name of the script, such as data_scripts/make_posters.py.
    """
    path = Path(path).expanduser()
    try:
        if not path.exists():
            return "is missing"
        folder = path.parent if path.name in _LAST_FILES else path
        name = Path(script).stem
        problem_of = _KINDS.get(name, run_problem if name.startswith("train_") else None)
        return problem_of(folder) if problem_of and folder.is_dir() else None
    except OSError as error:  # a loop of links, a folder that may not be read
        return f"cannot be read ({error.strerror})"


def dataset_problem(folder: Path) -> str | None:
    """Return what is wrong with a dataset, by its manifest; without one, every Parquet file must have its end."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return _sizes_problem(folder, manifest["files"])
    if (folder / MANIFEST).exists():
        return f"has a damaged {MANIFEST}"
    files = sorted((folder / "data").glob("*.parquet"))  # earlier versions made datasets without a manifest
    if not files:
        return None if (folder / "metadata.jsonl").is_file() else f"has no {MANIFEST}"
    return next((f"has a damaged file {file.name}" for file in files if not _is_whole_parquet(file)), None)


def tokenizer_problem(folder: Path) -> str | None:
    """Return what is wrong with a tokenizer of train_tokenizer.py; None if its files can be loaded."""
    from tokenizers import Tokenizer

    for name in ("tokenizer_config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            return f"has no {name}"
        if read_json_object(folder / name) is None:
            return f"has a damaged {name}"
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises Exception itself
        return f"has a damaged tokenizer.json ({error})"
    return None


def cache_problem(folder: Path) -> str | None:
    """Return what is wrong with a latent cache, by its manifest and the sizes of its shards; of a cache with more than
    `SHARDS_LOOKED_AT` shards, of this many evenly spaced ones. Every shard is verified when it is first read."""
    manifest = read_json(folder / CACHE_MANIFEST)
    if not (folder / CACHE_MANIFEST).is_file():
        return "has not been finished"
    try:
        files = {
            f"{name}/{shard['file']}": int(shard["bytes"])
            for name, split in manifest["splits"].items()
            for shard in split["shards"]
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"has a damaged {CACHE_MANIFEST}"
    step = -(-len(files) // SHARDS_LOOKED_AT) or 1
    return _sizes_problem(folder, dict(itertools.islice(files.items(), 0, None, step)))


def run_problem(folder: Path) -> str | None:
    """Return what is wrong with the exported pipeline of a run; `folder` is the run or the pipeline itself."""
    pipeline = folder if (folder / PIPELINE_INDEX).is_file() else folder / "pipeline"
    index = read_json_object(pipeline / PIPELINE_INDEX)
    if not (pipeline / PIPELINE_INDEX).is_file():
        return "has no exported pipeline"
    if index is None:
        return f"has a damaged {PIPELINE_INDEX}"
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and not name.startswith("_") and value[0]:
            files = [file for file in (pipeline / name).glob("*") if file.is_file()]
            damaged = next((file.name for file in files if not _is_whole(file)), None)
            if damaged or not files:
                return (
                    f"has a pipeline with a damaged {name}/{damaged}" if damaged else f"has a pipeline without {name}"
                )
    return None


_KINDS: dict[str, Callable[[Path], str | None]] = {
    "make_posters": dataset_problem,
    "make_emoji": dataset_problem,
    "make_controls": dataset_problem,
    "import_captions": dataset_problem,
    "train_tokenizer": tokenizer_problem,
    "precompute_latents": cache_problem,
}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a dataset ("made_by", "settings", "files"); None if there is none or it is damaged."""
    manifest = read_json_object(folder / MANIFEST)
    if manifest is None:
        return None
    files, settings = manifest.get("files"), manifest.get("settings")
    if not isinstance(settings, dict) or not isinstance(files, dict):
        return None
    return manifest if all(isinstance(size, int) for size in files.values()) else None


def lock_of(folder: str | os.PathLike[str], refusal: str = "") -> FolderLock:
    """Return the lock that a process holds while it makes `folder`: a hidden file beside the folder.

    Args:
        refusal: message of the UserError if another process holds the lock.
    """
    path = Path(os.path.abspath(Path(folder).expanduser()))
    return FolderLock(path.with_name(f".{path.name}.lock"), refusal)


def _sizes_problem(folder: Path, sizes: Mapping[str, int]) -> str | None:
    for name, size in sizes.items():
        try:
            there = (folder / name).stat().st_size
        except (OSError, ValueError):  # ValueError: a name with a NUL
            return f"lacks the file {name}"
        if there != size:
            return f"has a file {name} of {there} bytes instead of {size}"
    return None


def _is_whole_parquet(file: Path) -> bool:
    with file.open("rb") as opened:
        start = opened.read(4)
        opened.seek(max(0, file.stat().st_size - 4))
        return start == opened.read() == _PARQUET_MAGIC


def _is_whole(file: Path) -> bool:
    """Return whether a file of a pipeline's component is complete, as far as its format says."""
    if file.suffix == ".json":
        return read_json(file) is not None
    return _has_all_tensors(file) if file.suffix == ".safetensors" else True


def _has_all_tensors(file: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size
        if length + 8 > size:
            return False
        try:
            header = json.loads(opened.read(length))
            return max(_ends(header), default=0) + 8 + length == size
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            return False


def _ends(header: Mapping[str, Any]) -> Iterator[int]:
    for name, tensor in header.items():
        if name != "__metadata__":
            yield tensor["data_offsets"][1]
