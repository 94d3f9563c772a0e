"""Make a dataset of images in a folder and captions in a JSON file: an imagefolder, which all scripts read.

    python data_scripts/import_captions.py metadata.json --image_dir scans --output_dir data/scans

The file is a list of records ({"file_name": …, "caption": …}), one record a line, a mapping from file names to captions
or records, or COCO's ("images" and "annotations"). Several captions of one picture are kept as a list, of which
training draws one each time. Pictures are linked where the file system can, else copied.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from PIL import Image

from data_scripts.dataset_folder import check_replaceable, partial_folder, put_in_place
from pipelines.tools.cli import UserError, entry_point, nearest
from pipelines.tools.commands import command
from training.core.options import Options
from training.core.parsing import parse_config

FILE_FIELDS = ("file_name", "filename", "file", "image", "image_path", "path", "img", "name", "id")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp")
SHOWN = 10


@dataclass
class ImportConfig(Options):
    """Flags of this script; the first word may be the file."""

    metadata: str = ""
    """JSON or JSON lines file with the captions"""
    image_dir: str = ""
    """Folder with the pictures that the file names"""
    output_dir: str | None = None
    """Folder to write; unset: beside the pictures' folder, its name with _captioned"""
    caption_field: str = "caption"
    """Field of a record that holds the caption, or a list of them"""
    file_field: str | None = None
    """Field that holds the picture's file name; unset takes the first of the usual ones"""
    on_missing: Literal["error", "skip"] = "error"
    """A picture that is not there, or a record without a caption: stop and list them, or leave them out"""
    overwrite: bool = False
    """Set aside a dataset that is there"""

    def validate(self, prefix: str = "") -> None:
        """Raises UserError for a missing flag."""
        super().validate(prefix)
        if not self.metadata:
            usage = command("data_scripts/import_captions.py metadata.json …")
            raise UserError(f"no metadata file was named: {usage}")
        if not self.image_dir:
            raise UserError("--image_dir is missing; it is the folder with the pictures")

    def require_sources(self) -> None:
        """Raises UserError for a file or folder that is not there."""
        if not Path(self.metadata).expanduser().is_file():
            raise UserError(f"the metadata file {self.metadata} does not exist; check its path")
        images = Path(self.image_dir).expanduser()
        if not images.is_dir():
            raise UserError(f"--image_dir {self.image_dir} is no folder; check its path")
        if images.resolve().is_relative_to(self.target.resolve()):
            raise UserError(f"--output_dir {self.target} holds the pictures that are imported; name another folder")

    @property
    def target(self) -> Path:
        images = Path(self.image_dir).expanduser()
        if images.name in ("", ".."):
            images = images.resolve()  # `.` has no name to add to
        return Path(self.output_dir).expanduser() if self.output_dir else images.with_name(f"{images.name}_captioned")


def main(argv: Sequence[str] | None = None) -> int | None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words = ["--metadata", *words]
    config = parse_config(ImportConfig, words, description=__doc__)
    config.require_sources()
    target = config.target
    check_replaceable(target, "an imagefolder", "metadata.jsonl", config.overwrite)
    captions, problems = read_captions(config)
    pictures = _find_pictures(captions, Path(config.image_dir).expanduser(), problems)
    _report(problems, config)
    if not pictures:
        raise UserError(f"none of the {len(captions):,} pictures of {config.metadata} is left to import")
    try:
        aside = write_imagefolder(pictures, captions, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another --output_dir") from error
    if aside:
        print(f"The earlier dataset is now in {aside}.")
    several = sum(len(captions[name]) > 1 for name in pictures)
    print(f"{len(pictures):,} captioned pictures ({several:,} with several captions) are in {target}")
    print(f"Train with them: --train_data_dir {target}")
    return 0


def read_captions(config: ImportConfig) -> tuple[dict[str, list[str]], list[str]]:
    """File name → captions, in the file's order, and what is wrong with its records.

    Raises:
        UserError: no JSON, or no record with a caption.
    """
    captions: dict[str, list[str]] = {}
    problems: list[str] = []
    fields: set[str] = set()
    for number, record in enumerate(_records(config), 1):
        fields |= record.keys()
        name = _file_name(record, config.file_field, Path(config.image_dir).expanduser())
        if name is None:
            problems.append(f"record {number}: no file name (it has {', '.join(record) or 'no fields'})")
            continue
        own = _texts(record.get(config.caption_field))
        if own:
            captions.setdefault(name, []).extend(text for text in own if text not in captions.get(name, []))
        else:
            problems.append(f"record {number} ({name}): no caption")
    if not captions:
        if config.caption_field in fields:
            raise UserError(f"{config.metadata} has no captions: every '{config.caption_field}' is empty")
        raise UserError(
            f"{config.metadata} has no captions: no record has a field '{config.caption_field}'"
            f"{nearest(config.caption_field, fields)} (they have {', '.join(sorted(fields)) or 'no fields'}); "
            "name the field with --caption_field, and the pictures' with --file_field"
        )
    return captions, problems


def write_imagefolder(pictures: Mapping[str, Path], captions: Mapping[str, list[str]], target: Path) -> Path | None:
    """`target` with the pictures and metadata.jsonl, complete or not at all. Where what was there is now, if it was."""
    # A column holds texts or lists of them, never both.
    several = any(len(captions[name]) > 1 for name in pictures)
    lines = []
    with partial_folder(target) as partial:
        for name, source in pictures.items():
            # Names without an ending get that of the picture that was found.
            stored = name if PurePosixPath(name).suffix.lower() == source.suffix.lower() else f"{name}{source.suffix}"
            place = partial / stored
            place.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source, place)
            text: Any = captions[name] if several else captions[name][0]
            lines.append(json.dumps({"file_name": stored, "text": text}, ensure_ascii=False))
        (partial / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return put_in_place(partial, target)


def _records(config: ImportConfig) -> Iterator[dict[str, Any]]:
    """Every record of the file, whatever its form."""
    path = Path(config.metadata).expanduser()
    content = _read(path)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = _coco(content, config.caption_field)
    elif isinstance(content, dict) and _is_record(content, config):
        content = [content]
    elif isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if len(lists) == 1 and len(content) <= 3:
            content = lists[0]
        else:
            content = [_keyed(name, value, config.caption_field) for name, value in content.items()]
    if not isinstance(content, list):
        raise UserError(f"{path} holds a {type(content).__name__}; it should be a list of records with captions")
    for record in content:
        yield record if isinstance(record, dict) else {}


def _is_record(content: Mapping[str, Any], config: ImportConfig) -> bool:
    """Whether it tells one picture and its caption, rather than many by name."""
    return config.caption_field in content and _file_value(content, config.file_field) is not None


def _read(path: Path) -> Any:
    raw = path.read_bytes()
    try:
        text = raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}: {error.reason}); save it as UTF-8") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            raise UserError(
                f"{path} is no JSON (line {error.lineno}: {error.msg}); mend it, or export it anew"
            ) from None


def _coco(content: Mapping[str, Any], caption_field: str) -> list[dict[str, Any]]:
    names = {image.get("id"): image.get("file_name") for image in content.get("images") or []}
    return [
        {"file_name": names.get(note.get("image_id")), caption_field: note.get(caption_field)}
        for note in content["annotations"]
        if isinstance(note, dict)
    ]


def _keyed(name: str, value: Any, caption_field: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"file_name": name, **value}
    return {"file_name": name, caption_field: value}


def _file_name(record: Mapping[str, Any], file_field: str | None, folder: Path) -> str | None:
    """The picture's path relative to the folder, with forward slashes; nothing above the folder.

    Of a path on the machine where the file was written, the longest end that is in the folder.
    """
    value = _file_value(record, file_field)
    if value is None:
        return None
    path = PurePosixPath(value.replace("\\", "/"))
    if not (path.is_absolute() or PureWindowsPath(value).drive or ".." in path.parts):
        return str(path)
    parts = [part for part in path.parts if part not in ("/", "..") and not part.endswith(":")]
    ends = (PurePosixPath(*parts[first:]) for first in range(len(parts)))
    return str(next((end for end in ends if (folder / end).is_file()), path.name))


def _file_value(record: Mapping[str, Any], file_field: str | None) -> str | None:
    """What the record calls its picture."""
    values = (record.get(field) for field in ([file_field] if file_field else FILE_FIELDS))
    return next((str(value) for value in values if isinstance(value, (str, int)) and str(value).strip()), None)


def _texts(value: Any) -> list[str]:
    several = value if isinstance(value, list) else [value]
    return [" ".join(text.split()) for text in several if isinstance(text, str) and text.strip()]


def _find_pictures(captions: dict[str, list[str]], folder: Path, problems: list[str]) -> dict[str, Path]:
    """Name → file, of the pictures that are there; a name without an ending takes the first that is.

    Captions of a file that has two names go to the first.
    """
    known = Image.registered_extensions()
    readable = {ending for ending, kind in known.items() if kind in Image.OPEN}
    found: dict[str, Path] = {}
    names: dict[Path, str] = {}
    for name in list(captions):
        ending = PurePosixPath(name).suffix.lower()
        endings = ("",) if ending in readable else ("", *SUFFIXES, *map(str.upper, SUFFIXES))
        files = [folder / f"{name}{end}" for end in endings]
        file = next((f for f in files if f.is_file() and f.suffix.lower() in readable), None)
        if file is None:
            there = "is no picture" if files[0].is_file() else f"the picture is not in {folder}"
            problems.append(f"{name}: {there}")
            continue
        first = names.setdefault(file.resolve(), name)
        if first == name:
            found[name] = file
        else:
            captions[first].extend(text for text in captions[name] if text not in captions[first])
    return found


def _link_or_copy(source: Path, place: Path) -> None:
    try:
        os.link(source.resolve(), place)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, place)


def _report(problems: Sequence[str], config: ImportConfig) -> None:
    """Raises UserError when there are problems that are not to be skipped; says how many are."""
    if not problems:
        return
    if config.on_missing == "skip":
        print(f"{len(problems):,} records are left out, the first: {problems[0]}")
        return
    shown = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        shown.append(f"  and {len(problems) - SHOWN:,} more")
    raise UserError(
        "\n".join(
            [f"{len(problems):,} records cannot be used:", *shown, "mend them, or leave them out: --on_missing skip"]
        )
    )


if __name__ == "__main__":
    entry_point(main)
