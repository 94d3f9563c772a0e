"""What each file of a folder of images became: rows of splits, or something that is left out, and why."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.tools.commands import command, install_command
from training.data.caption_tables import FILE_COLUMNS, caption_columns, header_of, usual_column
from training.data.folder_captions import FolderRows
from training.data.folder_layout import CAPTION_SUFFIXES, FolderFiles, Layout

_SHOWN = 3
_CLASSES_SHOWN = 12
_HEIC = (".heic", ".heif", ".hif")
_SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
_TEXTS_OPENED = 20
_BEGINNING = 65_536
_CAPTION_WORDS = ('"caption', '"prompt"', '"text"', '"annotations"', '"description"')


@dataclass
class LeftOut:
    """Files that are not read."""

    count: int
    what: str
    """What the files are, such as "images in no row of metadata.csv" """
    examples: list[str] = field(default_factory=list)
    fix: str = ""
    minor: bool = False
    """Whether these are neither images nor captions, so that the line at the start of a training leaves them out"""

    @classmethod
    def of(cls, files: Sequence[str], what: str, fix: str = "", *, minor: bool = False) -> LeftOut:
        return cls(len(files), what, list(files[:_SHOWN]), fix, minor)

    @property
    def brief(self) -> str:
        return f"{self.what}: {self.count:,}"

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.examples) else ""
        examples = f" ({', '.join(self.examples)}{more})" if self.examples else ""
        return f"{self.brief}{examples}" + (f"; {self.fix}" if self.fix else "")


@dataclass
class FolderAccount:
    """The account of a folder of images."""

    folder: str
    files: int = 0
    """Number of all files"""
    splits: dict[str, int] = field(default_factory=dict)
    """Number of rows of each split"""
    classes: dict[str, int] = field(default_factory=dict)
    """Number of rows of each class, if folders are classes"""
    captions: str = ""
    """Where the captions come from; empty without captions"""
    remarks: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def images_left_out(self) -> int:
        """Number of files that are, or may be, images or captions, and are not used."""
        return sum(entry.count for entry in self.left_out if not entry.minor)

    def lines(self) -> list[str]:
        """Return the account in sentences, one in each line."""
        rows = ", ".join(f"{name} {count:,}" for name, count in self.splits.items())
        lines = [
            f"{self.folder} contains {self.files:,} files. Images by split: {rows}.",
            f"Captions: {self._captions}.",
        ]
        lines.append(f"Classes by folder: {self._classes}." if self.classes else "Classes by folder: none.")
        lines += [f"{remark}." for remark in self.remarks]
        lines += [f"Left out: {entry}." for entry in self.left_out] or ["Nothing is left out."]
        return lines

    def line(self) -> str:
        """Return the account in one line, for the start of a training."""
        rows = " and ".join(f"{count:,} in {name}" for name, count in self.splits.items())
        classes = f"{len(self.classes):,} classes by folder" if self.classes else "no classes by folder"
        text = f"{self.folder}: {rows}; captions: {self._captions}; {classes}"
        text += "".join(f". {remark}" for remark in self.remarks)
        entries = "; ".join(entry.brief for entry in self.left_out if not entry.minor)
        check = command("data_scripts/check_dataset.py")
        return f"{text}. Left out: {entries} ({check} lists them)" if entries else text

    @property
    def _captions(self) -> str:
        return self.captions or "none"

    @property
    def _classes(self) -> str:
        shown = ", ".join(f"{name} {count:,}" for name, count in list(self.classes.items())[:_CLASSES_SHOWN]) or "none"
        hidden = len(self.classes) - _CLASSES_SHOWN
        return f"{shown} and {hidden:,} more" if hidden > 0 else shown

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FolderAccount:
        """Return the account that `to_json` stored. Raises TypeError or KeyError for anything else."""
        return cls(**{**value, "left_out": [LeftOut(**entry) for entry in value["left_out"]]})


def account_of(root: Path, files: FolderFiles, rows: FolderRows, layout: Layout) -> FolderAccount:
    """Return what each file of a folder became."""
    splits = Counter(layout.split_of(image) for image in rows.images)
    labels = [] if "label" in rows.table.column_names else [layout.class_of(image) for image in rows.images]
    classes = Counter(label for label in labels if label is not None)
    account = FolderAccount(str(root), files.number, dict(splits), dict(sorted(classes.items())), rows.captions)
    account.remarks += layout.remarks
    account.left_out += _images_in_no_row(files, rows)
    account.left_out += unread_images(root, files)
    used = set(rows.used)
    unread = [name for name in (*files.texts, *files.tables, *files.json, *files.labels) if name not in used]
    beside, importable = _like_captions(root, unread, files.images)
    like_captions = sorted([*beside, *importable])
    account.left_out += _unread_captions(root, like_captions, importable, rows)
    sheets = {name for name in files.other if os.path.splitext(name)[1].lower() in _SPREADSHEETS}
    if others := sorted({*files.other, *unread}.difference(like_captions, sheets)):
        account.left_out.append(LeftOut.of(others, "other files", minor=True))
    if files.hidden:
        account.left_out.append(LeftOut(files.hidden, "hidden files", minor=True))
    return account


def _images_in_no_row(files: FolderFiles, rows: FolderRows) -> Iterator[LeftOut]:
    named = {*rows.images, *(name for column in rows.image_columns for name in rows.table[column].to_pylist())}
    missing = [image for image in files.images if image not in named]
    if missing:
        tables = ", ".join(rows.used)
        yield LeftOut.of(missing, f"images in no row of {tables}", "add rows for them to train on them as well")


def unread_images(root: Path, files: FolderFiles) -> Iterator[LeftOut]:
    """Yield the files that are, or may contain, images, but cannot be read."""
    heic = [name for name in files.unreadable if os.path.splitext(name)[1].lower() in _HEIC]
    if heic:
        install = install_command("heic", "pillow-heif")
        yield LeftOut.of(heic, "HEIC images", f"they need the package pillow-heif: {install}")
    if others := sorted(set(files.unreadable).difference(heic)):
        yield LeftOut.of(others, "images in formats that are not read", "convert them to PNG or JPEG")
    if files.misnamed:
        fix = "give them the extension of their format, such as .png or .jpg"
        yield LeftOut.of(files.misnamed, "images without the extension of an image", fix)
    if files.archives:
        yield LeftOut.of(files.archives, "archives", "unpack them if they contain images")
    if sheets := [name for name in files.other if os.path.splitext(name)[1].lower() in _SPREADSHEETS]:
        yield LeftOut.of(sheets, "spreadsheets", "if they hold captions, save them as CSV")
    if files.links:
        fix = "links to folders are not followed; move the folders, or give them as --train_data_dir"
        yield LeftOut.of(files.links, "linked folders", fix)


def _like_captions(root: Path, unread: Sequence[str], images: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files, of those that are not read, that are beside an image with the same name, and the others that
    begin like a table, or like JSON, with captions."""
    stems = {os.path.splitext(image)[0] for image in images}
    beside = [name for name in unread if os.path.splitext(name)[0] in stems]
    others = sorted(set(unread).difference(beside))
    texts = [name for name in others if PurePosixPath(name).suffix.lower() in CAPTION_SUFFIXES]
    opened = sorted(set(others).difference(texts[_TEXTS_OPENED:]))
    return beside, [name for name in opened if _has_captions(root / name)]


def _has_captions(path: Path) -> bool:
    """Return whether a file begins like a table, or like JSON, with captions."""
    if path.suffix.lower() in (".json", ".jsonl"):
        with path.open("rb") as file:
            start = file.read(_BEGINNING).decode("utf-8", "replace").lower()
        return any(word in start for word in _CAPTION_WORDS)
    columns = header_of(path)
    return bool(caption_columns(columns) and usual_column(columns, FILE_COLUMNS))


def _unread_captions(
    root: Path, like_captions: Sequence[str], importable: Sequence[str], rows: FolderRows
) -> Iterator[LeftOut]:
    if not like_captions:
        return
    if rows.captions:
        fix = f"the captions come from: {rows.captions}"
    elif importable:
        script = command(f"data_scripts/import_captions.py {root / importable[0]} --image_dir {root}")
        fix = f"to train on them, run: {script}"
    else:
        fix = "give at least half of the images a .txt file of the same name, or write metadata.csv"
    yield LeftOut.of(like_captions, "files that look like captions", fix)
