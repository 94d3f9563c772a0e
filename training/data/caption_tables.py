"""Tables that name image files, one in each row: metadata.csv, captions.csv, TSV, JSON Lines, Parquet.

People write such files with spreadsheets, scripts and other programs. Every common separator, encoding mark and header
name is read; what can be read in two ways is refused.
"""

from __future__ import annotations

import codecs
import csv
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from pipelines.tools.cli import UserError, one_line

if TYPE_CHECKING:
    import pyarrow

FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "image",
    "image_path",
    "path",
    "img",
    "name",
    "id",
    "image_name",
    "image_file",
    "file_path",
    "filepath",
)
"""Usual headers of the column with the names of image files; the first that a table has is used."""
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "prompts", "description", "caption_text", "alt_text")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_SEPARATORS = {";": "semicolon", ",": "comma", "\t": "tab", "|": "vertical bar"}
_ENCODINGS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def read_table(path: Path, texts: Sequence[str | None] = ()) -> pyarrow.Table:
    """Read a table, whose format is that of its extension; without a known one, it is CSV.

    Args:
        texts: columns of a CSV file to read as texts; those with usual headers always are.

    Raises:
        UserError: the file is empty or cannot be read.
    """
    import pyarrow
    import pyarrow.json
    import pyarrow.parquet

    content = path.read_bytes()
    if not content.strip():
        raise UserError(f"{path} is empty; write one line for each image, or delete it")
    if path.suffix.lower() not in (".jsonl", ".parquet"):
        return _read_csv(path, decoded(path, content), texts)
    try:
        if path.suffix.lower() == ".parquet":
            return pyarrow.parquet.read_table(path)
        options = pyarrow.json.ReadOptions(block_size=min(len(content) + 1, 2**31 - 1))
        return pyarrow.json.read_json(io.BytesIO(decoded(path, content).encode()), read_options=options)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        form = "Parquet" if path.suffix.lower() == ".parquet" else "JSON Lines, one object in each line"
        raise UserError(f"{path} cannot be read as {form} ({one_line(error, 200)}); write it again") from None


def header_of(path: Path) -> list[str]:
    """Return the names of the columns of a table, as far as they can be read; empty otherwise."""
    try:
        if path.suffix.lower() in (".csv", ".tsv", ".txt"):
            with path.open("rb") as file:
                start = file.read(65_536)
            text = decoded(path, start, errors="replace")
            return next(csv.reader(text.splitlines(), delimiter=separator_of(path, text)), [])
        return read_table(path).column_names
    except (OSError, UserError, csv.Error):
        return []


def separator_of(path: Path, text: str) -> str:
    """Return the separator of a CSV or TSV file: the one by which most columns of the first line have known names."""
    header = text.splitlines()[0] if text.strip() else ""
    known = {*FILE_COLUMNS, *CAPTION_COLUMNS}
    usual = "\t" if path.suffix.lower() == ".tsv" else ","

    def fitness(separator: str) -> tuple[int, int, bool]:
        names = next(csv.reader([header], delimiter=separator), [])
        return sum(plain_name(name) in known for name in names), len(names), separator == usual

    return max(_SEPARATORS, key=fitness)


def plain_name(column: str) -> str:
    """Return the name of a column as it is compared: "File Name" and "file-name" are "file_name"."""
    return "_".join(column.strip().lower().replace("-", " ").split())


def usual_column(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the first of the usual `names` that a table has, as the table spells it; None without one."""
    spelled: dict[str, str] = {}
    for column in columns:
        spelled.setdefault(plain_name(column), column)
    return next((spelled[name] for name in names if name in spelled), None)


def caption_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns with a usual header for captions."""
    return [column for column in columns if plain_name(column) in CAPTION_COLUMNS]


def decoded(path: Path, content: bytes, errors: str = "strict") -> str:
    """Return the text of a table in UTF-8 or UTF-16, without its byte order mark. Raises UserError."""
    encoding = next((name for mark, name in _ENCODINGS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}: {error.reason}); save it as UTF-8") from None


def _read_csv(path: Path, text: str, columns: Sequence[str | None]) -> pyarrow.Table:
    import pandas
    import pyarrow

    separator = separator_of(path, text)
    header = _checked_header(path, text, separator)
    # As text, so that the caption "none" and the file "007" are not read as a missing value and a number.
    usual = {*CAPTION_COLUMNS, *FILE_COLUMNS}
    texts = {column: str for column in header if column in columns or plain_name(column) in usual}
    try:
        frame = pandas.read_csv(io.StringIO(text), sep=separator, converters=texts, index_col=False)
    except (ValueError, pandas.errors.ParserError) as error:
        raise UserError(f"{path} cannot be read as CSV ({one_line(error, 200)}); use metadata.jsonl") from None
    return pyarrow.Table.from_pandas(frame, preserve_index=False)


def _checked_header(path: Path, text: str, separator: str) -> list[str]:
    """Return the first row. Raises UserError for an unclosed quotation mark, and for rows with more fields than it."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            if len(row) > len(header) and any(row[len(header) :]):
                raise UserError(
                    f"{path} has {len(row)} fields in line {rows.line_num}, but its header has {len(header)}; is there "
                    f"a {_SEPARATORS[separator]} in a caption? Put the caption in quotation marks"
                )
    except csv.Error as error:
        raise UserError(
            f"{path} cannot be read as CSV ({error}, in the row that ends in line {rows.line_num}): is a "
            "quotation mark not closed? Fix that row, or use metadata.jsonl"
        ) from None
    return header


class ImageNames:
    """Finds the image that a table names, among the image files of a folder.

    Args:
        images: paths relative to the folder, with forward slashes.
    """

    def __init__(self, images: Iterable[str]):
        self._paths: dict[str, str] = {}
        self._without_suffix: dict[str, list[str]] = {}
        self._alone: dict[str, list[str]] = {}
        for image in images:
            path = PurePosixPath(_composed(image))
            self._paths[str(path)] = image
            self._without_suffix.setdefault(str(path.with_suffix("")), []).append(image)
            self._alone.setdefault(path.name, []).append(image)

    def find(self, value: Any, folder: str = "", *, anywhere: bool = False) -> str | None:
        """Return the path of the image that `value` names, or None.

        A path that is absolute or contains `..` comes from the machine where the table was written. It is replaced by
        its longest ending that exists in the folder.

        Args:
            value: a path, with slashes or backslashes, with or without the extension of the file.
            folder: folder of the table; `value` is relative to it.
            anywhere: also find an image of another folder, if it is the only one with this file name.
        """
        written = "" if value is None else _composed(str(value).strip().replace("\\", "/"))
        if not written or "://" in written:
            return None
        path = PurePosixPath(written)
        parts = [part for part in path.parts if part not in ("/", "..") and not part.endswith(":")]
        foreign = path.is_absolute() or bool(PureWindowsPath(written).drive) or ".." in path.parts
        for first in range(len(parts) if foreign else min(1, len(parts))):
            ending = str(PurePosixPath(folder, *parts[first:]))
            found = [self._paths[ending]] if ending in self._paths else self._without_suffix.get(ending, [])
            if len(found) == 1:
                return found[0]
        alone = self._alone.get(path.name, []) if anywhere else []
        return alone[0] if len(alone) == 1 else None


def _composed(name: str) -> str:
    """Return a name in Unicode normalization form C: macOS stores "ä" in file names as two characters."""
    return unicodedata.normalize("NFC", name)


def grouped(rows: Sequence[Mapping[str, Any]], captions: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row for each image: texts of rows with the same image become lists.

    Args:
        rows: dicts with "image" and other columns.
        captions: the columns whose texts are collected; of other columns, the first value is kept.
    """
    several: dict[Any, dict[str, Any]] = {}
    for row in rows:
        first = several.setdefault(row["image"], {**row, **{name: [] for name in captions}})
        for name in captions:
            value = row[name]
            first[name] += [text for text in (value if isinstance(value, list) else [value]) if text not in first[name]]
    return list(several.values())
