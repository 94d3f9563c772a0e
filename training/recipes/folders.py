"""Where the runs of a collection lie: everything that belongs to the same images is in `runs/NAME`.

A file there remembers which images they are, so that they are recognized at another place. Other images in a folder of
the same name get another folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError
from pipelines.tools.files import image_suffixes
from training.core.files import read_json_object, write_json
from training.data.caption_tables import TABLE_SUFFIXES
from training.data.folder_layout import CAPTION_SUFFIXES, METADATA_NAMES

RUNS = Path("runs")
FILE = "collection.json"


def collection_folder(source: str, *, write: bool) -> Path:
    """Return the folder of the collection that `source` names: `runs/NAME`, or `runs/NAME_2` if other images have that.

    Args:
        source: the Hub id, folder or file of the data.
        write: whether to write down which collection the folder belongs to.

    Raises:
        UserError: files were added to the collection, or removed, since something was made from it.
    """
    identity = _identity(source)
    known = {file.parent: read_json_object(file) or {} for file in sorted(RUNS.glob(f"*/{FILE}"))}
    same = [folder for folder, other in known.items() if other.get("files") == identity["files"]]
    earlier = [folder for folder, other in known.items() if other.get("place") == identity["place"]]
    if same:
        return same[0]
    for folder in filter(_has_inputs, earlier):
        raise UserError(
            f"{source} has changed since {folder} was made from it: {known[folder].get('count'):,} files of images and "
            f"captions were there, now {identity['count']:,} files are. To train on the files of today, rename or "
            f"delete {folder} (it holds the autoencoder, the latents and the models of the earlier files) and run "
            "the command again; to train on the earlier files, restore them"
        )
    name = _name_of(source)
    free = (RUNS / (name if number == 1 else f"{name}_{number}") for number in itertools.count(1))
    folder = earlier[0] if earlier else next(folder for folder in free if not folder.exists())
    if write:
        with contextlib.suppress(OSError):  # what is made next in this folder says why it cannot be written
            _remember(folder, identity)
    return folder


def _remember(folder: Path, identity: dict[str, Any]) -> None:
    """Write down whose folder it is. A new folder appears together with its file, since other processes look for it."""
    if folder.is_dir():
        write_json(folder / FILE, identity)
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    write_json(temporary / FILE, identity)
    temporary.rename(folder)


def _has_inputs(folder: Path) -> bool:
    return any(entry.is_dir() for entry in folder.iterdir())


def _name_of(source: str) -> str:
    """Return a name for the folder: that of the folder or file, or the last part of a Hub id."""
    path = Path(os.path.abspath(os.path.expanduser(source)))
    name = path.stem if path.is_file() else path.name
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "images"


def _identity(source: str) -> dict[str, Any]:
    """Return what tells one collection from another. It holds no path, since run folders are shared."""
    path = Path(os.path.expanduser(source))
    place = os.path.abspath(path) if path.exists() else source
    files = sorted(_files(path)) if path.is_dir() else [(path.name, path.stat().st_size)] if path.is_file() else []
    return {"place": _hash(place), "files": _hash(repr(files)) if files else _hash(place), "count": len(files)}


def _files(folder: Path) -> list[tuple[str, int]]:
    """Return the relative name and the size of every image, table and text in a folder."""
    suffixes = {*image_suffixes(), *CAPTION_SUFFIXES, *TABLE_SUFFIXES, ".parquet", ".arrow", ".json", ".jsonl"}
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and (os.path.splitext(name)[1].lower() in suffixes or name in METADATA_NAMES):
                file = os.path.join(where, name)
                found.append((os.path.relpath(file, folder).replace(os.sep, "/"), os.path.getsize(file)))
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
