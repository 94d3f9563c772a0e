"""Folders of images: their rows as tables, and an account of every file.

The tables are stored in the cache of `datasets` and opened again as long as no file of the folder changes: a million
files are not looked at in detail at every start.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipelines.tools.cli import UserError
from pipelines.tools.files import image_suffixes
from training.core.files import write_atomically
from training.data.archives import is_unpacked, with_archives_unpacked
from training.data.folder_account import FolderAccount, account_of, unread_images
from training.data.folder_captions import CaptionSource, FolderRows, rows_of
from training.data.folder_layout import FolderFiles, Layout, files_of, layout_of
from training.data.records import cache_file, read_record, write_record

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, DatasetDict

_VERSION = 2
"""Increased whenever the same files may become other rows than before."""
_SPLITS = ("train", "validation", "test")


def open_image_folder(path: Path, source: CaptionSource, state: str, shown: Path) -> tuple[DatasetDict, FolderAccount]:
    """Open a folder of images.

    Args:
        source: where captions come from (see `DataConfig.caption_source`).
        state: `files_state` of the folder, or of the archive that it was unpacked from.
        shown: that folder or archive, for the account.

    Raises:
        UserError: the folder contains no images that can be read, or it can be read in several ways.
    """
    import datasets

    key = [state, source, sorted(image_suffixes()), _VERSION, datasets.__version__]
    known = _recorded(key)
    if known is not None:
        return known
    root = with_archives_unpacked(Path(os.path.abspath(path)), state)
    files = files_of(root)
    _require_images(root, files, shown)
    rows = rows_of(root, files, source)
    layout = _layout(root, files, rows)
    tables = {name: _write(key, name, table) for name, table in _tables(root, rows, layout).items()}
    opened = datasets.DatasetDict({name: _opened([file]) for name, file in tables.items()})
    account = account_of(root, files, rows, layout)
    if is_unpacked(root):
        account.folder = os.path.abspath(shown)
        account.remarks.append(f"Archives are unpacked in {root}")
    files_of_tables = {name: [str(file)] for name, file in tables.items()}
    record = {"root": str(root), "tables": files_of_tables, "account": account.to_json()}
    write_record("imagefolder", key, record)
    return opened, account


def _recorded(key: Sequence[Any]) -> tuple[DatasetDict, FolderAccount] | None:
    import datasets

    record = read_record("imagefolder", key)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged one is made again
        if not Path(record["root"]).is_dir():  # unpacked archives that were deleted
            return None
        tables = {name: _opened(files) for name, files in record["tables"].items()}
        return datasets.DatasetDict(tables), FolderAccount.from_json(record["account"])
    return None


def _opened(files: Sequence[str | Path]) -> Dataset:
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


def _write(key: Sequence[Any], split: str, table: pyarrow.Table) -> Path:
    """Write the rows of a split into the cache of `datasets`, as it writes them."""
    import pyarrow

    def stream(file: IO[bytes]) -> None:
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=10_000)

    file = cache_file("images", [list(key), split], ".arrow")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, stream)
    return file


def _require_images(root: Path, files: FolderFiles, shown: Path) -> None:
    if files.images:
        return
    unread = list(unread_images(root, files))
    there = f" ({'; '.join(entry.brief for entry in unread)})" if unread else ""
    fix = next((entry.fix for entry in unread), "give another folder with --train_data_dir or --dataset_name")
    if any(name.endswith(".parquet") for name in files.tables):
        fix = "if the images are in its Parquet files, give it as --dataset_name instead of --train_data_dir"
    raise UserError(
        f"{'the folder ' if shown.is_dir() else ''}{shown} contains no images that can be read{there}; {fix}"
    )


def _layout(root: Path, files: FolderFiles, rows: FolderRows) -> Layout:
    """Return the splits and classes of the rows. Raises UserError if no row has an image of the folder."""
    there = set(files.images)
    images = [image for image in rows.images if image in there]
    if not images:
        first = next((image for image in rows.images if image), "no file at all")
        raise UserError(
            f"none of the {len(rows.images):,} rows of {', '.join(rows.used)} names an image in {root} (the first "
            f"names {first}); write paths relative to the table, such as {files.images[0]}"
        )
    return layout_of(images, str(root))


def _tables(root: Path, rows: FolderRows, layout: Layout) -> dict[str, pyarrow.Table]:
    """Return the table of each split, with images and classes in the types of `datasets`."""
    import datasets
    import pyarrow

    columns: dict[str, Any] = {"image": _image_array(root, rows.images)}
    for name in rows.table.column_names:
        values = rows.table[name]
        columns[name] = _image_array(root, values.to_pylist()) if name in rows.image_columns else values
    labels = layout.classes and "label" not in columns
    if labels:
        ids: dict[str | None, int] = {name: i for i, name in enumerate(layout.classes)}
        columns["label"] = pyarrow.array([ids.get(layout.class_of(image)) for image in rows.images], pyarrow.int64())
    table = pyarrow.table(columns)
    features = datasets.Features.from_arrow_schema(table.schema.remove_metadata())
    features |= {name: datasets.Image() for name in ("image", *rows.image_columns)}
    if labels:
        features["label"] = datasets.ClassLabel(names=list(layout.classes))
    table = table.cast(features.arrow_schema)
    splits: dict[str, list[int]] = {}
    for row, image in enumerate(rows.images):
        splits.setdefault(layout.split_of(image), []).append(row)
    return {name: table.take(splits[name]) for name in _SPLITS if name in splits}


def _image_array(root: Path, images: Sequence[str | None]) -> pyarrow.Array:
    """Return images as `datasets` stores them: their paths, without their bytes."""
    import datasets
    import pyarrow

    folder = os.path.join(root, "")
    paths = pyarrow.array([None if image is None else folder + image for image in images], pyarrow.string())
    # Not from dictionaries: one for each of a million images would take seconds and half a gigabyte.
    fields = [pyarrow.nulls(len(paths), pyarrow.binary()), paths]
    images_of_type = pyarrow.StructArray.from_arrays(fields, ["bytes", "path"], mask=paths.is_null())
    return images_of_type.cast(datasets.Image().pa_type)
