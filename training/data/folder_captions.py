"""The rows of a folder of images: which image each has, its caption, and the other columns of a table.

Captions are looked for in this order: metadata.csv, metadata.jsonl or metadata.parquet; another table that names the
images; a text file beside each image. What can be read in two ways is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pipelines.tools.cli import UserError
from pipelines.tools.files import read_text
from training.core.files import read_json_object
from training.data.archives import is_archive
from training.data.caption_tables import (
    FILE_COLUMNS,
    ImageNames,
    caption_columns,
    grouped,
    header_of,
    plain_name,
    read_table,
    usual_column,
)
from training.data.folder_layout import CAPTION_SUFFIXES, METADATA_NAMES, FolderFiles

if TYPE_CHECKING:
    import pyarrow

CaptionSource = Literal["auto", "file_name", "folder_name"]
# A table or the text files of a folder are its captions if at least this share of them belongs to images.
_ENOUGH = 0.5
_FILE_NAME = "_file_name"
_ALONE = "\0"  # a column of a table that names only images, which Arrow could not join without one


@dataclass
class FolderRows:
    """Rows of a folder of images.

    Attributes:
        images: path of each image relative to the folder; None for a row that names none.
        table: the other columns.
        image_columns: columns of the table with paths, relative to the folder, of other images.
        captions: where the captions come from; empty without captions.
        used: tables and text files that were read.
    """

    images: list[str | None]
    table: pyarrow.Table
    image_columns: list[str] = field(default_factory=list)
    captions: str = ""
    used: list[str] = field(default_factory=list)

    def with_column(self, name: str, values: Any) -> FolderRows:
        """Return the rows with a column, which replaces one of the same name."""
        table = self.table.drop_columns([name]) if name in self.table.column_names else self.table
        if not table.num_columns:
            import pyarrow

            return FolderRows(self.images, pyarrow.table({name: values}), [], self.captions, self.used)
        return FolderRows(self.images, table.append_column(name, values), self.image_columns, self.captions, self.used)


def rows_of(root: Path, files: FolderFiles, source: CaptionSource) -> FolderRows:
    """Return the rows of a folder.

    Raises:
        UserError: a table cannot be read or names no image of the folder, or there are two sources of captions.
    """
    metadata = [name for name in files.tables if PurePosixPath(name).name in METADATA_NAMES]
    texts = _texts_beside(files)
    if metadata:
        rows = _rows_of_tables(root, metadata, ImageNames(files.images), metadata=True)
    elif tables := _caption_tables(root, files):
        if texts and source == "auto":
            raise UserError(
                f"{root} has captions both in {', '.join(tables)} and in text files beside the images, such as "
                f"{next(iter(texts.values()))}; move one of them out of the folder"
            )
        rows = _rows_of_tables(root, tables, ImageNames(files.images), metadata=False)
    else:
        rows = _rows_with_texts(root, files, texts)
    if source != "auto":
        return _named(rows, source, root)
    return rows


def _rows_with_texts(root: Path, files: FolderFiles, texts: dict[str, str]) -> FolderRows:
    """Return the rows of images that have their captions and labels in files of the same name, or none."""
    import pyarrow

    rows = FolderRows(list(files.images), pyarrow.table({}))
    if texts:
        rows = _with_values(rows, "text", texts, {name: _words_in(root / name) for name in texts.values()})
        rows.captions = "text files beside the images"
    elif objects := _beside(files.images, files.json, (".json",)):
        read = {name: read_json_object(root / name) or {} for name in objects.values()}
        columns = caption_columns(sorted({key for value in read.values() for key in value}))
        if column := "text" if "text" in columns else columns[0] if len(columns) == 1 else None:
            captions = {name: value.get(column) for name, value in read.items()}
            rows = _with_values(rows, "text", objects, {k: v for k, v in captions.items() if isinstance(v, str)})
            rows.captions = f"{column} in JSON files beside the images"
    if labels := _beside(files.images, files.labels, (".cls",)):
        rows = _with_values(rows, "label", labels, {name: _words_in(root / name) or None for name in labels.values()})
    return rows


def _with_values(rows: FolderRows, column: str, beside: dict[str, str], values: Mapping[str, str | None]) -> FolderRows:
    """Return the rows with the value of the file beside each image; None for an image without one."""
    import pyarrow

    of_rows = [values.get(beside.get(image or "", "")) for image in rows.images]
    rows = rows.with_column(column, pyarrow.array(of_rows, pyarrow.string()))
    rows.used += sorted(set(beside.values()))
    return rows


def _words_in(path: Path) -> str:
    return " ".join(read_text(path).split())


def _texts_beside(files: FolderFiles) -> dict[str, str]:
    return _beside(files.images, files.texts, CAPTION_SUFFIXES)


def _beside(images: Sequence[str], others: Sequence[str], suffixes: Sequence[str]) -> dict[str, str]:
    """Return the file of the same name of each image that has one; empty if less than half of the images have one."""
    known = set(others)
    found = {}
    for image in images:
        names = (f"{os.path.splitext(image)[0]}{suffix}" for suffix in suffixes)
        if (name := next((name for name in names if name in known), None)) is not None:
            found[image] = name
    return found if len(found) >= _ENOUGH * len(images) else {}


def _caption_tables(root: Path, files: FolderFiles) -> list[str]:
    """Return the tables, other than metadata, that hold captions of the images.

    Raises:
        UserError: tables of several names do.
    """
    names = ImageNames(files.images)
    found = []
    for table in files.tables:
        columns = header_of(root / table)
        if caption_columns(columns) and usual_column(columns, FILE_COLUMNS):
            content = read_table(root / table)
            column = _file_column(content, names, _folder(table), anywhere=True)
            values = content[column].to_pylist() if column else []
            known = sum(names.find(value, _folder(table), anywhere=True) is not None for value in values)
            if known and known >= _ENOUGH * len(values):
                found.append(table)
    if len({PurePosixPath(table).name for table in found}) > 1:
        raise UserError(
            f"{root} has captions in several tables ({', '.join(found)}); keep one in the folder, or rename it to "
            "metadata.csv with the header file_name,text"
        )
    return found


def _rows_of_tables(root: Path, tables: Sequence[str], names: ImageNames, *, metadata: bool) -> FolderRows:
    import pyarrow

    parts, images, image_columns = [], [], []
    if len({PurePosixPath(table).suffix for table in tables}) > 1:
        raise UserError(f"{root} has metadata in several formats ({', '.join(tables)}); keep one of them")
    for name in tables:
        table, folder = read_table(root / name), _folder(name)
        column = _file_column(table, names, folder, anywhere=not metadata)
        if column is None:
            raise UserError(
                f"{root / name} has no column with the names of the images (its columns are "
                f"{', '.join(table.column_names)}); call it file_name"
            )
        images += [_place(value, folder, names, anywhere=not metadata) for value in table[column].to_pylist()]
        kept = table.drop_columns([c for c in {column, "image"} if c in table.column_names])
        for other in [c for c in kept.column_names if c.endswith(_FILE_NAME)]:
            places = [_place(value, folder, names, anywhere=False) for value in kept[other].to_pylist()]
            index = kept.column_names.index(other)
            kept = kept.set_column(index, other[: -len(_FILE_NAME)], pyarrow.array(places, pyarrow.string()))
            image_columns.append(other[: -len(_FILE_NAME)])
        parts.append(kept if kept.num_columns else pyarrow.table({_ALONE: pyarrow.nulls(table.num_rows)}))
    joined = _joined(root, tables, parts)
    joined = joined.drop_columns([_ALONE]) if _ALONE in joined.column_names else joined
    rows = FolderRows(images, joined, list(dict.fromkeys(image_columns)), used=list(tables))
    if not metadata and len(set(images)) < len(images):
        rows = _grouped(rows)
    return _with_text(rows, tables)


def _joined(root: Path, tables: Sequence[str], parts: Sequence[pyarrow.Table]) -> pyarrow.Table:
    import pyarrow

    try:
        return pyarrow.concat_tables(parts, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise UserError(f"the columns of {', '.join(tables)} in {root} differ ({error}); give them the same") from None


def _grouped(rows: FolderRows) -> FolderRows:
    """Return one row for each image: the captions of several rows become a list."""
    import pyarrow

    dicts = [{**row, "image": image} for row, image in zip(rows.table.to_pylist(), rows.images, strict=True)]
    merged = grouped(dicts, caption_columns(rows.table.column_names))
    images = [row.pop("image") for row in merged]
    return FolderRows(images, pyarrow.Table.from_pylist(merged), rows.image_columns, used=rows.used)


def _with_text(rows: FolderRows, tables: Sequence[str]) -> FolderRows:
    """Return the rows with a column `text`, if it is clear which column holds the captions."""
    columns = caption_columns(rows.table.column_names)
    where = f"of {', '.join(tables)}"
    if "text" in columns:
        rows.captions = f"column text {where}"
    elif len(columns) == 1:
        rows = rows.with_column("text", rows.table[columns[0]])
        rows.captions = f"column {columns[0]} {where}"
    elif columns:
        rows.captions = f"one of the columns {', '.join(columns)} {where}, which --caption_column names"
    return rows


def _file_column(table: pyarrow.Table, names: ImageNames, folder: str, *, anywhere: bool) -> str | None:
    """Return the column with the names of the images: `file_name`, or the usual one that names most images."""
    if "file_name" in table.column_names:
        return "file_name"
    usual = [column for column in table.column_names if plain_name(column) in FILE_COLUMNS]
    usual.sort(key=lambda column: FILE_COLUMNS.index(plain_name(column)))

    def known(column: str) -> int:
        return sum(names.find(value, folder, anywhere=anywhere) is not None for value in table[column].to_pylist())

    return max(usual, key=known, default=None)


def _place(value: Any, folder: str, names: ImageNames, *, anywhere: bool) -> str | None:
    """Return the path, relative to the folder of the images, that a row names, even if this file does not exist."""
    if value is None or not str(value).strip():
        return None
    found = names.find(value, folder, anywhere=anywhere)
    if found is not None:
        return found
    parts = PurePosixPath(str(value).strip().replace("\\", "/")).parts
    return str(
        PurePosixPath(
            folder,
            *(part for part in parts if part not in ("/", "..")),
        )
    )


def _folder(table: str) -> str:
    return str(PurePosixPath(table).parent).removeprefix(".")


def _named(rows: FolderRows, source: CaptionSource, root: Path) -> FolderRows:
    """Return the rows with the names of files or folders as captions."""
    import pyarrow

    captions = []
    for image in rows.images:
        path = PurePosixPath(image or "")
        if source == "folder_name" and image is not None and not _folder_name(path):
            raise UserError(
                f"--caption_source folder_name takes the name of the folder of each image, but {image} is in {root} "
                "itself; move it into a folder"
            )
        captions.append(words_of(path.stem if source == "file_name" else _folder_name(path)) or None)
    named = rows.with_column("text", pyarrow.array(captions, pyarrow.string()))
    named.captions = "names of the files" if source == "file_name" else "names of the folders"
    return named


def _folder_name(path: PurePosixPath) -> str:
    """Return the name of the folder of a file; of an unpacked archive, without the extension."""
    name = path.parent.name
    return name.partition(".")[0] if is_archive(name) else name


def words_of(name: str) -> str:
    """Return a name of a file or folder as a caption: "red_circle-012 (2)" is "red circle"."""
    text = re.sub(r"\s*\(\d+\)$", "", name)
    text = " ".join(re.sub(r"[_\-.+]+", " ", text).split())
    return re.sub(r"(?:\s+\d+)+$", "", text)


@dataclass(frozen=True)
class CaptionTable:
    """A table of a folder that is read, with what a script needs to complete its captions.

    Attributes:
        name: path relative to the folder.
        file_column: the column with the names of the images.
        caption_column: the column with the captions; `text` if the table has none yet.
        images: path of the image of each row, relative to the folder; None for a row that names none.
        captions: caption, list of captions, or None, of each row.
    """

    name: str
    file_column: str
    caption_column: str
    images: list[str | None]
    captions: list[Any]


def tables_read(root: Path, files: FolderFiles, caption_column: str | None = None) -> list[CaptionTable]:
    """Return the tables that `rows_of` reads; empty if the captions are in text files, or if there are none.

    Args:
        caption_column: the column with the captions; None is the one with a usual header.

    Raises:
        UserError: a table cannot be read, or several of its columns may hold the captions.
    """
    metadata = [name for name in files.tables if PurePosixPath(name).name in METADATA_NAMES]
    names, found = ImageNames(files.images), []
    for name in metadata or _caption_tables(root, files):
        table = read_table(root / name, [caption_column])
        usual = caption_columns(table.column_names)
        if caption_column is None and len(usual) > 1 and "text" not in usual:
            raise UserError(f"{root / name} has captions in {', '.join(usual)}; choose one with --caption_column")
        captions = caption_column or ("text" if "text" in usual or not usual else usual[0])
        column = _file_column(table, names, _folder(name), anywhere=not metadata)
        if column is None:
            raise UserError(f"{root / name} has no column with the names of the images; call it file_name")
        anywhere = not metadata
        images = [names.find(value, _folder(name), anywhere=anywhere) for value in table[column].to_pylist()]
        present = captions in table.column_names
        values = table[captions].to_pylist() if present else [None] * table.num_rows
        found.append(CaptionTable(name, column, captions, images, values))
    return found
