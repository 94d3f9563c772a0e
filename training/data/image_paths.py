"""Paths in the image columns of a dataset: only files of the dataset itself are read.

A row holds the bytes of an image, or the path of its file. A Parquet or JSON file from somebody else can name any file
of this machine, which would then appear in samples or in a dataset that is made from it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pipelines.tools.cli import UserError, printable
from training.data.archives import unpacked_folder
from training.data.shards.places import shard_of
from training.data.shards.remote import is_remote
from training.data.shards.sources import remote_folder

if TYPE_CHECKING:
    from datasets import Dataset

_ARCHIVE = "::"
_LEADS_OUT = r"(?i)\.\.|%2e"
"""What is in each path that leads out of its folder, and in some others"""


def refuse_foreign_paths(dataset: Dataset, column: str, source: str, *, streaming: bool = False) -> None:
    """Raise UserError if an image in `column`, of type `datasets.Image`, is a file outside of the dataset.

    Only the rows without bytes are looked at, so that this takes no time for datasets that hold their images.

    Args:
        source: the Hub id, folder, file or URL that the dataset was opened from.
        streaming: whether the images are in shards that are read where they are.
    """
    import pyarrow.compute

    folders = _folders(source, streaming)
    for chunk in dataset.data.column(column).chunks:
        paths = pyarrow.compute.filter(chunk.field("path"), pyarrow.compute.is_null(chunk.field("bytes")))
        for folder in folders:  # nearly all, at once: to look at a million paths one by one takes seconds
            plain = pyarrow.compute.starts_with(paths, folder)
            plain = pyarrow.compute.and_not(plain, pyarrow.compute.match_substring_regex(paths, _LEADS_OUT))
            if is_remote(folder):  # only places in shards are read there
                plain = pyarrow.compute.and_(plain, pyarrow.compute.match_substring(paths, _ARCHIVE))
            paths = pyarrow.compute.filter(paths, pyarrow.compute.invert(pyarrow.compute.fill_null(plain, False)))
        for path in paths.drop_null().to_pylist():
            if _is_inside(path, folders):
                continue
            if path.startswith(("http://", "https://")):
                raise UserError(
                    f"column '{column}' of {source} has the URL {printable(path)[:200]}; images are not downloaded: "
                    "download them, for example with img2dataset, and write the paths of the files into the column"
                )
            raise UserError(
                f"column '{column}' of {source} names the file {printable(path)[:200]}, which is not in the dataset's "
                "own folder and is therefore not read; move the images into the folder, or store them in the column"
            )


def _folders(source: str, streaming: bool) -> tuple[str, ...]:
    """Return the folders whose files belong to the dataset, each with a separator at its end. A remote source has the
    beginning of the URLs of its shards."""
    path = Path(source).expanduser()
    if streaming and not path.exists() and (remote := remote_folder(source)) is not None:
        return (remote,)
    if glob.has_magic(source) and not path.exists():  # a pattern of files: the folder before its first part with a *
        path = next((folder for folder in path.parents if not glob.has_magic(str(folder))), path)
    if path.exists():
        own = path if path.is_dir() else path.parent
        return tuple(_with_separator((os.path.abspath(own), os.path.realpath(own), *_unpacked())))
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    return tuple(_with_separator((str(HF_HUB_CACHE), str(datasets.config.HF_DATASETS_CACHE), *_unpacked())))


def _unpacked() -> tuple[str, ...]:
    """Return the folders in which `datasets`, and `training.data.archives`, unpack archives."""
    import datasets

    return str(datasets.config.EXTRACTED_DATASETS_PATH), str(unpacked_folder())


def _with_separator(folders: Iterable[str]) -> Iterable[str]:
    return (os.path.abspath(folder).rstrip(os.sep) + os.sep for folder in folders)


def _is_inside(path: str, folders: tuple[str, ...]) -> bool:
    """Return whether the file, or the archive or shard that it is in (zip://a.png::/data/x.zip), is in one of the
    folders."""
    if is_remote(path):  # a server may take %2e%2e as .., and one on Windows \ as /
        shard = shard_of(path) or ""
        return shard.startswith(folders) and ".." not in re.split(r"[/\\]", unquote(shard))
    # The name of a folder may contain ::
    file = shard_of(path) or (path.rpartition(_ARCHIVE)[2] if "://" in path else path)
    return "://" not in file and os.path.abspath(file).startswith(folders)
