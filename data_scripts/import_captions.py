"""Combine a folder of images and a file of captions into an imagefolder, which all scripts can read.

    python data_scripts/import_captions.py captions.csv --image_dir scans --output_dir data/scans

The file can be a CSV file with any common separator, a TSV, Parquet or JSON file. A table needs one column with the
names of the images and one with the captions, with usual headers such as file_name, image, caption or text. A JSON file
can be a list of records ({"file_name": …, "caption": …}), contain one record per line, map file names to captions or
records, or be in COCO's format ("images" and "annotations"). Several captions of one image are kept as a list, and
training draws one of them each time. Images are hard-linked if the file system supports it; otherwise they are copied.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from data_scripts.dataset_folder import check_replaceable, making, new_folder, write_manifest
from pipelines.tools.cli import UserError, entry_point, located, nearest, printable
from pipelines.tools.commands import command
from pipelines.tools.files import image_suffixes
from training.core.options import Options
from training.core.parsing import parse_config
from training.data.caption_tables import FILE_COLUMNS, caption_columns, header_of, plain_name, read_table
from training.data.caption_text import caption_problem, cleaned_caption

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp")
SHOWN = 10
SCRIPT = "import_captions.py"
CAPTION = "caption"
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")


@dataclass
class ImportConfig(Options):
    """Flags of this script. The metadata file may also be given as the first argument."""

    metadata: str = ""
    """CSV, TSV, Parquet, JSON or JSON Lines file with the captions (required)"""
    image_dir: str = ""
    """Folder with the images that the metadata file refers to (required)"""
    output_dir: str | None = None
    """Folder to write; if unset, the path of --image_dir followed by _captioned"""
    caption_field: str | None = None
    """Field or column with the caption, or list of captions, of an image; if unset, caption, or the one with another
    usual name, such as text or prompt"""
    file_field: str | None = None
    """Field or column with the name of the image file; if unset, the first usual name, such as file_name"""
    on_missing: Literal["error", "skip"] = "error"
    """What to do if an image or a caption is missing: stop and list all such records, or skip them"""
    overwrite: bool = False
    """Rename an earlier dataset in --output_dir (it is not deleted), and make a new one"""

    def validate(self, prefix: str = "") -> None:
        """Raise UserError if a required flag is missing."""
        super().validate(prefix)
        if not self.metadata:
            usage = command("data_scripts/import_captions.py captions.csv …")
            raise UserError(f"no metadata file is given; run: {usage}")
        if not self.image_dir:
            raise UserError("--image_dir is missing; it is the folder with the images")

    def require_sources(self) -> None:
        """Raise UserError if the metadata file or the image folder does not exist."""
        if not Path(self.metadata).expanduser().is_file():
            raise UserError(f"the metadata file {located(self.metadata)} does not exist; check its path")
        images = Path(self.image_dir).expanduser()
        if not images.is_dir():
            raise UserError(f"--image_dir {located(self.image_dir)} is not a folder; check its path")
        if images.resolve().is_relative_to(self.target.resolve()):
            raise UserError(f"--output_dir {self.target} contains the images to import; choose another folder")

    @property
    def target(self) -> Path:
        images = Path(self.image_dir).expanduser()
        if images.name in ("", ".."):
            images = images.resolve()  # `.` has no name that a suffix could be added to
        return Path(self.output_dir).expanduser() if self.output_dir else images.with_name(f"{images.name}_captioned")


def main(argv: Sequence[str] | None = None) -> int | None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words = ["--metadata", *words]
    config = parse_config(ImportConfig, words, description=__doc__)
    config.require_sources()
    with making(config.target) as target:
        check_replaceable(target, SCRIPT, "imported captions", config.overwrite)
        _import(config, target)
    return 0


def _import(config: ImportConfig, target: Path) -> None:
    """Write the imagefolder `target`."""
    captions, problems = read_captions(config)
    images = _find_images(captions, Path(config.image_dir).expanduser(), problems)
    _report(problems, config)
    if not images:
        raise UserError(f"none of the {len(captions):,} images in {config.metadata} can be imported; check --image_dir")
    with new_folder(target) as (partial, aside):
        write_imagefolder(images, captions, Path(config.image_dir).expanduser(), partial)
        settings = {"caption_field": config.caption_field, "file_field": config.file_field}
        write_manifest(partial, SCRIPT, settings, (file for file in partial.rglob("*") if file.is_file()))
    for path in aside:
        print(f"The earlier dataset is now in {path}.")
    several = sum(len(captions[name]) > 1 for name in images)
    print(f"{len(images):,} captioned images ({several:,} with several captions) are in {config.target}")
    print(f"Train with them: --train_data_dir {config.target}")


def read_captions(config: ImportConfig) -> tuple[dict[str, list[str]], list[str]]:
    """Return the captions by file name, in the file's order, and the problems of its records.

    Raises:
        UserError: the file is not valid JSON, or no record has a caption.
    """
    captions: dict[str, list[str]] = {}
    problems: list[str] = []
    records = _records(config)
    fields = list(dict.fromkeys(field for record in records for field in record))
    caption_field = config.caption_field or _usual_caption_field(config, fields)
    for number, record in enumerate(records, 1):
        name = _file_name(record, config.file_field, Path(config.image_dir).expanduser())
        if name is None:
            problems.append(f"record {number}: no file name (it has {', '.join(record) or 'no fields'})")
            continue
        own = _texts(record.get(caption_field))
        problem = caption_problem(own) if own else "no caption"
        if problem is None:
            captions.setdefault(name, []).extend(text for text in own if text not in captions.get(name, []))
        else:
            problems.append(f"record {number} ({name}): {problem}")
    if not captions:
        if caption_field in fields and problems and all("no file name" in problem for problem in problems):
            raise UserError(
                f"{config.metadata} names no images: no record has a field such as file_name or image (they have "
                f"{', '.join(sorted(fields))}); name the image file's field with --file_field"
            )
        if caption_field in fields:
            raise UserError(f"{config.metadata} has no captions: every '{caption_field}' is empty")
        raise UserError(
            f"{config.metadata} has no captions: no record has a field '{caption_field}'"
            f"{nearest(caption_field, fields)} (they have {', '.join(sorted(fields)) or 'no fields'}); "
            "name the caption's field with --caption_field, and the image file's field with --file_field"
        )
    return captions, problems


def write_imagefolder(
    images: Mapping[str, Path], captions: Mapping[str, list[str]], source: Path, target: Path
) -> None:
    """Write the images, which are in the folder `source`, and metadata.jsonl to the empty folder `target`."""
    # A column of the dataset holds either texts or lists of texts, never both.
    several = any(len(captions[name]) > 1 for name in images)
    lines = []
    for name, file in images.items():
        # A name without a file extension gets that of its image file.
        stored = name if PurePosixPath(name).suffix.lower() == file.suffix.lower() else f"{name}{file.suffix}"
        place = target / stored
        place.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(file, place, source)
        text: Any = captions[name] if several else captions[name][0]
        lines.append(json.dumps({"file_name": stored, "text": text}, ensure_ascii=False))
    (target / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _usual_caption_field(config: ImportConfig, fields: Sequence[str]) -> str:
    """Return the field that holds the captions, by its name. Raises UserError if several could."""
    usual = caption_columns(fields)
    if CAPTION in usual or not usual:
        return CAPTION
    if len(usual) > 1:
        raise UserError(
            f"{config.metadata} has several fields that may hold the captions ({', '.join(usual)}); choose one with "
            f"--caption_field, for example --caption_field {usual[0]}"
        )
    return usual[0]


def _records(config: ImportConfig) -> list[dict[str, Any]]:
    """Return every record of the file, whatever its format."""
    path = Path(config.metadata).expanduser()
    suffix = path.suffix.lower()
    if suffix in SPREADSHEETS:
        raise UserError(f"{path} is a spreadsheet ({suffix}); save it as CSV (UTF-8) and import the CSV file")
    if suffix in (".csv", ".tsv", ".parquet") or (suffix == ".txt" and caption_columns(header_of(path))):
        return read_table(path, texts=[config.caption_field, config.file_field]).to_pylist()
    content = _read(path)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = _coco(content)
    elif isinstance(content, dict) and _is_record(content, config):
        content = [content]
    elif isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if len(lists) == 1 and len(content) <= 3:
            content = lists[0]
        else:
            content = [_keyed(name, value, config.caption_field or CAPTION) for name, value in content.items()]
    if not isinstance(content, list):
        raise UserError(f"{path} holds a {type(content).__name__}; it should be a list of records with captions")
    return [record if isinstance(record, dict) else {} for record in content]


def _is_record(content: Mapping[str, Any], config: ImportConfig) -> bool:
    """Return whether the object is the record of one image, rather than a mapping from file names to captions."""
    captioned = config.caption_field in content if config.caption_field else bool(caption_columns(content))
    return captioned and _file_value(content, config.file_field) is not None


def _read(path: Path) -> Any:
    raw = path.read_bytes()
    try:
        text = raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}: {error.reason}); save it as UTF-8") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # Not `splitlines`, which also splits at characters that JSON allows in texts, e.g. U+2028.
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        try:
            return [json.loads(line) for line in lines]
        except (json.JSONDecodeError, RecursionError):
            raise UserError(
                f"{path} is not valid JSON (line {error.lineno}: {error.msg}); fix it, or export it again"
            ) from None


def _coco(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {image.get("id"): image.get("file_name") for image in content.get("images") or []}
    notes = (note for note in content["annotations"] if isinstance(note, dict))
    return [{**note, "id": None, "file_name": names.get(note.get("image_id"))} for note in notes]


def _keyed(name: str, value: Any, caption_field: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"file_name": name, **value}
    return {"file_name": name, caption_field: value}


def _file_name(record: Mapping[str, Any], file_field: str | None, folder: Path) -> str | None:
    """Return the image's path relative to the folder, with forward slashes; it never points outside the folder.

    A path that is absolute or contains `..` comes from the machine where the file was written. It is replaced by its
    longest ending that exists in the folder.
    """
    value = _file_value(record, file_field)
    if value is None:
        return None
    path = PurePosixPath(value.replace("\\", "/"))
    if not (path.is_absolute() or PureWindowsPath(value).drive or ".." in path.parts):
        return str(path)
    parts = [part for part in path.parts if part not in ("/", "..") and not part.endswith(":")]
    ends = (PurePosixPath(*parts[first:]) for first in range(len(parts)))
    return str(next((end for end in ends if os.path.isfile(folder / end)), path.name))


def _file_value(record: Mapping[str, Any], file_field: str | None) -> str | None:
    """Return the record's name of its image file, or None."""
    named = record if file_field else {plain_name(field): value for field, value in record.items()}
    values = (named.get(field) for field in ([file_field] if file_field else FILE_COLUMNS))
    return next((str(value) for value in values if isinstance(value, (str, int)) and str(value).strip()), None)


def _texts(value: Any) -> list[str]:
    several = value if isinstance(value, list) else [value]
    texts = (" ".join(cleaned_caption(text).split()) for text in several if isinstance(text, str))
    return [text for text in texts if text]


def _find_images(captions: dict[str, list[str]], folder: Path, problems: list[str]) -> dict[str, Path]:
    """Return the image file of each name, and add the names without one to `problems`.

    For a name without a file extension, the common extensions are tried in order. If two names refer to one file, the
    captions of both are collected under the first name.
    """
    readable = image_suffixes()
    images: dict[str, Path] = {}
    names: dict[Path, str] = {}
    for name in list(captions):
        ending = PurePosixPath(name).suffix.lower()
        endings = ("",) if ending in readable else ("", *SUFFIXES, *map(str.upper, SUFFIXES))
        files = [folder / f"{name}{end}" for end in endings]
        file = next((f for f in files if os.path.isfile(f) and f.suffix.lower() in readable), None)
        if file is None:
            problem = "is not an image" if os.path.isfile(files[0]) else f"the image is not in {folder}"
            problems.append(f"{name}: {problem}")
            continue
        first = names.setdefault(file.resolve(), name)
        if first == name:
            images[name] = file
        else:
            captions[first].extend(text for text in captions[name] if text not in captions[first])
    return images


def _link_or_copy(file: Path, place: Path, folder: Path) -> None:
    """Link a file of `folder`. A file elsewhere, to which a symbolic link leads, may be of somebody else: copy it."""
    path = file.resolve()
    if not file.is_symlink() and path.is_relative_to(folder.resolve()):
        try:
            os.link(path, place)
            return
        except OSError:  # another file system, or one that does not support hard links
            pass
    shutil.copyfile(path, place)


def _report(problems: Sequence[str], config: ImportConfig) -> None:
    """Raise UserError if there are problems, or print their number if they are to be skipped."""
    if not problems:
        return
    if config.on_missing == "skip":
        print(f"{len(problems):,} records are skipped; the first is {printable(problems[0])}")
        return
    shown = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        shown.append(f"  and {len(problems) - SHOWN:,} more")
    raise UserError(
        "\n".join(
            [f"{len(problems):,} records cannot be used:", *shown, "fix them, or skip them with --on_missing skip"]
        )
    )


if __name__ == "__main__":
    entry_point(main)
