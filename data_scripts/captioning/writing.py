"""Where the captions of a folder are missing, and writing them there: metadata.jsonl, a table, or text files.

A table is completed in its own format: only empty captions change, and the file as it was is kept.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.tools.cli import UserError
from pipelines.tools.files import read_text
from pipelines.tools.replacing import WRITING
from training.core.files import write_atomically
from training.data.caption_tables import decoded, separator_of
from training.data.folder_captions import CaptionTable, rows_of, tables_read
from training.data.folder_layout import CAPTION_SUFFIXES, FolderFiles, files_of

OWN_FOLDER = "__captions"
"""Folder, in that of the images, for the journal, the contact sheet and earlier tables; its name keeps it from being
read as data."""
METADATA = "metadata.jsonl"


@dataclass
class Missing:
    """The images of a folder without a caption.

    Attributes:
        images: their paths relative to the folder, each once.
        where: where their captions are written, for messages.
        unlisted: images that no row of the tables names.
        write: writes captions, by the path of their image.
    """

    images: list[str]
    where: str
    write: Callable[[Mapping[str, str]], None]
    unlisted: list[str] = field(default_factory=list)


def missing_captions(root: Path, caption_column: str | None, add_rows: bool) -> Missing:
    """Return which images of a folder have no caption, as training reads the folder.

    Args:
        caption_column: the column of the captions in a table; None is the one with a usual header.
        add_rows: whether images that no row of a table names are captioned as well.

    Raises:
        UserError: the folder has no images that can be read, or can be read in several ways.
    """
    files = files_of(root)
    if any(name.lower().endswith(".zip") for name in files.archives):
        raise UserError(f"{root} contains zip archives; unpack them, so that their images can be captioned")
    if not files.images:
        raise UserError(f"the folder {root} contains no images that can be read; give another --train_data_dir")
    rows_of(root, files, "auto")  # raises for a folder that training would refuse
    tables = tables_read(root, files, caption_column)
    if tables:
        return _missing_in_tables(root, files, tables, add_rows)
    texts = {image: _texts_of(image, files) for image in files.images}
    if any(texts.values()):
        return _missing_texts(root, texts)

    def write(captions: Mapping[str, str]) -> None:
        lines = [
            json.dumps({"file_name": name, "text": captions[name]}, ensure_ascii=False) for name in sorted(captions)
        ]
        write_atomically(root / METADATA, "\n".join(lines) + "\n")

    return Missing(files.images, METADATA, write)


def delete_leftovers(root: Path) -> None:
    """Delete the temporary files that a killed process has left in a folder; no other process may be writing there."""
    for path in root.rglob(f"{WRITING}*"):
        if re.fullmatch(rf"{re.escape(WRITING)}\d+-.+", path.name) and path.is_file():
            path.unlink()


# --- text files ------------------------------------------------------------------------------------------------------


def _texts_of(image: str, files: FolderFiles) -> list[str]:
    names = (f"{os.path.splitext(image)[0]}{suffix}" for suffix in CAPTION_SUFFIXES)
    return [name for name in names if name in files.texts]


def _missing_texts(root: Path, texts: Mapping[str, list[str]]) -> Missing:
    """Return the images without a text file, or with an empty one. Images of one name share their text file."""
    suffixes = Counter(PurePosixPath(names[0]).suffix for names in texts.values() if names)
    usual = suffixes.most_common(1)[0][0]
    files: dict[str, str] = {}  # text file -> its first image
    for image, names in texts.items():
        if not names or not read_text(root / names[0]).strip():
            files.setdefault(names[0] if names else f"{os.path.splitext(image)[0]}{usual}", image)

    def write(captions: Mapping[str, str]) -> None:
        for file, image in files.items():
            if image in captions:
                write_atomically(root / file, captions[image] + "\n")

    return Missing(list(files.values()), f"{usual} files beside the images", write)


# --- tables ----------------------------------------------------------------------------------------------------------


def _missing_in_tables(root: Path, files: FolderFiles, tables: Sequence[CaptionTable], add_rows: bool) -> Missing:
    named = {image for table in tables for image in table.images}
    unlisted = [image for image in files.images if image not in named]
    homes = {image: _table_of(image, tables) for image in unlisted} if add_rows else {}
    homes = {image: table for image, table in homes.items() if table is not None}
    empty = [
        image for table in tables for image, text in zip(table.images, table.captions) if image and _is_empty(text)
    ]

    def write(captions: Mapping[str, str]) -> None:
        for table in tables:
            added = {
                image: captions[image] for image, home in homes.items() if home == table.name and image in captions
            }
            _complete(root, table, captions, added)

    where = ", ".join(table.name for table in tables)
    left = [image for image in unlisted if image not in homes]
    return Missing(list(dict.fromkeys([*empty, *homes])), where, write, left)


def _table_of(image: str, tables: Sequence[CaptionTable]) -> str | None:
    """Return the table in the nearest folder above the image; None without one."""
    above = [table.name for table in tables if PurePosixPath(image).is_relative_to(PurePosixPath(table.name).parent)]
    return max(above, key=lambda name: len(PurePosixPath(name).parts), default=None)


def _is_empty(caption: Any) -> bool:
    texts = caption if isinstance(caption, list) else [caption]
    return not any(text is not None and str(text).strip() for text in texts)


def _complete(root: Path, table: CaptionTable, captions: Mapping[str, str], added: Mapping[str, str]) -> None:
    """Write a table with captions in its empty rows, and with rows for the images in `added`."""
    rows = {
        number: captions[image]
        for number, (image, text) in enumerate(zip(table.images, table.captions))
        if image is not None and image in captions and _is_empty(text)
    }
    if not rows and not added:
        return
    path = root / table.name
    folder = str(PurePosixPath(table.name).parent)
    new = {str(PurePosixPath(image).relative_to(folder)): text for image, text in added.items()}
    content = _FORMATS.get(path.suffix.lower(), _complete_csv)(path, table, rows, new)
    _keep(root, table.name)
    write_atomically(path, content)


def _keep(root: Path, name: str) -> None:
    """Copy a table as it is into `OWN_FOLDER`, unless a killed process has already done so."""
    content = (root / name).read_bytes()
    for number in itertools.count(1):
        copy = root / OWN_FOLDER / f"before_{number}" / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(copy, content)
            return
        if copy.read_bytes() == content:
            return


def _complete_lines(path: Path, table: CaptionTable, rows: Mapping[int, str], new: Mapping[str, str]) -> str:
    lines = [line for line in decoded(path, path.read_bytes()).split("\n") if line.strip()]
    _require_rows(path, lines, table)
    lists = any(isinstance(text, list) for text in table.captions)
    for number, text in rows.items():
        lines[number] = _line({**json.loads(lines[number]), table.caption_column: [text] if lists else text})
    for image, text in new.items():
        lines.append(_line({table.file_column: image, table.caption_column: [text] if lists else text}))
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _complete_csv(path: Path, table: CaptionTable, rows: Mapping[int, str], new: Mapping[str, str]) -> bytes:
    content = path.read_bytes()
    text = decoded(path, content)
    separator = separator_of(path, text)
    header, *lines = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row]
    _require_rows(path, lines, table)
    if table.caption_column not in header:
        header.append(table.caption_column)
    column, name = header.index(table.caption_column), header.index(table.file_column)
    lines = [[*row, *[""] * (len(header) - len(row))] for row in lines]
    for number, caption in rows.items():
        lines[number][column] = caption
    for image, caption in new.items():
        lines.append([image if place == name else caption if place == column else "" for place in range(len(header))])
    written = io.StringIO(newline="")
    csv.writer(written, delimiter=separator, lineterminator="\r\n" if "\r\n" in text else "\n").writerows(
        [header, *lines]
    )
    # Spreadsheets write a mark at the beginning, by which they recognize the encoding.
    marked = content[:2] in (b"\xef\xbb", b"\xff\xfe", b"\xfe\xff")
    return written.getvalue().encode("utf-8-sig" if marked else "utf-8")


def _complete_parquet(path: Path, table: CaptionTable, rows: Mapping[int, str], new: Mapping[str, str]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stored = pyarrow.parquet.read_table(path)
    lists = any(isinstance(text, list) for text in table.captions)
    texts = [[rows[i]] if lists and i in rows else rows.get(i, text) for i, text in enumerate(table.captions)]
    kind = pyarrow.list_(pyarrow.string()) if lists else pyarrow.string()
    column = pyarrow.array(texts, kind)
    if table.caption_column in stored.column_names:
        stored = stored.set_column(stored.column_names.index(table.caption_column), table.caption_column, column)
    else:
        stored = stored.append_column(table.caption_column, column)
    if new:
        added = [
            {table.file_column: image, table.caption_column: [text] if lists else text} for image, text in new.items()
        ]
        stored = pyarrow.concat_tables([stored, pyarrow.Table.from_pylist(added)], promote_options="permissive")
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(stored, buffer)
    return buffer.getvalue()


_Complete = Callable[[Path, CaptionTable, Mapping[int, str], Mapping[str, str]], "str | bytes"]
_FORMATS: dict[str, _Complete] = {".jsonl": _complete_lines, ".parquet": _complete_parquet}
"""By extension, what returns the content of a completed table"""


def _require_rows(path: Path, lines: Sequence[Any], table: CaptionTable) -> None:
    """Raise UserError unless the file has one line for each row of the table."""
    if len(lines) != len(table.images):
        raise UserError(
            f"{path} cannot be completed: it has {len(lines):,} lines for {len(table.images):,} rows; save it as "
            "metadata.jsonl, with one object in each line"
        )
