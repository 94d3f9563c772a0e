"""Local files of rows: Parquet, JSON, CSV, TSV, text and Arrow, alone, by a pattern, or in a folder."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tools.cli import UserError
from pipelines.tools.files import image_suffixes
from training.data.archives import is_archive, linked_folder
from training.data.caption_tables import read_table, separator_of
from training.data.column_types import with_typed_images
from training.data.records import cache_file, files_state

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_FILE_LOADERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "manifest.json")
# Characters that `datasets`, and the library fsspec that it uses, take for a pattern or for a chain of URLs.
_PATTERN = re.compile(r"[*?\[\]{}]|::")


def matching_files(path: Path) -> list[Path]:
    """Return the files that a path with *, ? or [ matches, in order; empty for other paths."""
    if not glob.has_magic(str(path)):
        return []
    return sorted(Path(file) for file in glob.glob(str(path), recursive=True) if os.path.isfile(file))


def load_local(source: Path | Sequence[Path], config_name: str | None, only_split: str) -> Dataset | DatasetDict:
    """Open a file, several files, a folder of tables, or a folder written by `save_to_disk`.

    Raises:
        UserError: the files have other formats than tables, or several of them, or some would be left out.
    """
    import datasets

    if not isinstance(source, Path) or source.is_file():
        return _load_files([source] if isinstance(source, Path) else source, only_split)
    if is_saved(source):
        return _typed(datasets.load_from_disk(source), source)
    require_every_file(source, config_name)
    cache = _cache_of_these_files(source, config_name)
    return _typed(datasets.load_dataset(_plain_path(source), config_name, cache_dir=cache), source)


def _typed(loaded: Dataset | DatasetDict, folder: Path) -> Dataset | DatasetDict:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        return datasets.DatasetDict({name: with_typed_images(split, folder) for name, split in loaded.items()})
    return with_typed_images(loaded, folder)


def _load_files(files: Sequence[Path], split: str) -> Dataset:
    """Open files of one format as one split; relative paths in their rows begin at the folder of their file."""
    import datasets

    if any(map(is_archive, files)):
        raise UserError(f"{files[0]} is an archive, but a pattern names only tables; give the folder of the archives")
    loaders = {_FILE_LOADERS.get(file.suffix.lower()): file for file in files}
    if None in loaders:
        file, known = loaders[None], ", ".join(_FILE_LOADERS)
        raise UserError(
            f"{file} has {f'the extension {file.suffix}' if file.suffix else 'no extension'}; a dataset is a folder, "
            f"an archive, or a file with one of the extensions {known}"
        )
    if len(loaders) > 1:
        names = ", ".join(str(file) for file in loaders.values())
        raise UserError(f"the files have several formats ({names}); give those of one format, or a folder")
    of_folders: dict[Path, list[Path]] = {}
    for file in files:
        of_folders.setdefault(Path(os.path.abspath(file)).parent, []).append(file)
    parts = [with_typed_images(_rows_of(some, split), folder) for folder, some in of_folders.items()]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _rows_of(files: Sequence[Path], split: str) -> Dataset:
    """Return the rows of files of one format in one folder."""
    import datasets

    loader = _FILE_LOADERS[files[0].suffix.lower()]
    if loader == "csv" and not all(map(_is_plain_csv, files)):
        tables = [read_table(file).replace_schema_metadata(None) for file in files]
        return datasets.concatenate_datasets([datasets.Dataset(table) for table in tables])
    return datasets.load_dataset(loader, data_files={split: [_plain_path(file) for file in files]})[split]


def _is_plain_csv(file: Path) -> bool:
    """Return whether a table has the form that `datasets` reads: UTF-8 without a mark, separated by commas."""
    with file.open("rb") as opened:
        start = opened.read(65_536)
    if start.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return False
    return separator_of(file, start.decode("utf-8", "replace")) == ","


def _plain_path(path: Path) -> str:
    """Return a path of a file or folder that `datasets` does not take for a pattern: if necessary, that of a link."""
    if not _PATTERN.search(str(path)):
        return str(path)
    if path.is_dir():  # of links to all files, since a link to a folder is not followed
        return str(linked_folder(path, files_state(path)))
    key = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    link = cache_file("", "").parent / "links" / f"{key}{path.suffix}"
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process, or an earlier one, has made it
        link.symlink_to(os.path.abspath(path))
    return str(link)


def is_saved(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _cache_of_these_files(path: Path, config_name: str | None) -> str | None:
    """Return a cache folder for the current files of a dataset that has a README.md, or None for the usual folder.

    `datasets` (observed in 5.2) identifies such a dataset by its path alone, and would return the old rows for new
    files.
    """
    import datasets
    from datasets.fingerprint import Hasher

    if not (path / "README.md").is_file():
        return None
    files = datasets.load_dataset_builder(_plain_path(path), config_name).config.data_files
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"files-{Hasher.hash(files)}")


def readme_defines_splits(path: Path) -> bool:
    """Return whether the README.md of a dataset says which files belong to which split."""
    readme = path / "README.md"
    if not readme.is_file():
        return False
    front, dashes, _ = readme.read_text(encoding="utf-8", errors="replace").partition("\n---")
    return bool(dashes) and front.startswith("---") and "\nconfigs:" in front


def require_every_file(path: Path, config_name: str | None) -> None:
    """Raise UserError if `datasets` would read some of the tables in a folder and leave out others."""
    import datasets

    if config_name or readme_defines_splits(path):
        return
    found = datasets.load_dataset_builder(_plain_path(path)).config.data_files or {}
    read = {os.path.realpath(file) for files in found.values() for file in files}
    suffixes = {os.path.splitext(file)[1].lower() for file in read}
    hidden = re.compile(r"(^|/)(\.|__)")
    every = [
        os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names if name not in _NOT_DATA
    ]
    every = [file for file in every if not hidden.search(os.path.relpath(file, path).replace(os.sep, "/"))]
    data = suffixes.intersection({*_FILE_LOADERS, *image_suffixes()})
    tables = [file for file in every if os.path.splitext(file)[1].lower() in data]
    missing = sorted(os.path.relpath(file, path) for file in tables if os.path.realpath(file) not in read)
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing):,} of {len(tables):,} {'/'.join(sorted(data))} files in {path} are in no split "
            f"({shown}), because names of other files or folders are those of splits ({', '.join(map(str, found))}); "
            "rename those, or give every file the name of a split, or move these files out of the folder"
        )
