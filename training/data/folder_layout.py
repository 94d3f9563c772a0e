"""What the files and folders of a folder of images are: images, tables, captions; splits and classes.

All paths are relative to the folder, with forward slashes. Files are never assigned to splits by their own names, and
folders only if every image is in the folder of a split.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipelines.tools.cli import UserError
from pipelines.tools.files import image_suffixes
from training.data.archives import is_archive
from training.data.caption_tables import TABLE_SUFFIXES

SPLIT_NAMES = {
    name: split
    for split, names in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for name in names
}
"""Name of a folder, in lower case -> its split. These are the names that `datasets` recognizes."""
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_SUFFIXES = (".txt", ".caption")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")
UNREADABLE_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".psd", ".psb", ".eps", ".ps", ".ai", ".svg", ".pdf", ".ico", ".cur"),
    *(".icns", ".dds", ".exr", ".hdr", ".xcf", ".kra", ".pcx", ".sgi", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"),
    *(".orf", ".rw2", ".pef", ".srw", ".raw", ".wmf", ".emf", ".fits", ".djvu"),
)
"""Extensions of images in formats that are not read; those that `image_suffixes` contains are read."""
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")


@dataclass
class FolderFiles:
    """The files below a folder by what they are, each list in order."""

    images: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Text files that may be captions"""
    json: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    """Files of WebDataset with the class of the image of the same name"""
    archives: list[str] = field(default_factory=list)
    """Archives that are not unpacked"""
    unreadable: list[str] = field(default_factory=list)
    """Images in formats that are not read"""
    misnamed: list[str] = field(default_factory=list)
    """Images whose name has another extension, or none"""
    links: list[str] = field(default_factory=list)
    """Links to folders, which are not followed"""
    hidden: int = 0
    """Number of hidden files, and of files in hidden folders"""
    other: list[str] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Number of all files; a link counts as one."""
        return self.hidden + sum(len(names) for names in vars(self).values() if isinstance(names, list))


def files_of(root: Path) -> FolderFiles:
    """List all files below a folder. Files and folders whose names begin with `.` or `__` are hidden."""
    files, kinds = FolderFiles(), _kinds()
    folders = [("", False)]
    while folders:
        folder, hidden = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder:
                    folders.append((path, hidden or entry.name.startswith((".", "__"))))
                elif hidden or entry.name.startswith("."):
                    files.hidden += 1
                elif _is_link_to_folder(entry):
                    files.links.append(path)
                else:
                    kind = kinds.get(os.path.splitext(entry.name)[1].lower(), "other")
                    getattr(files, kind).append(path)
    _check_names(root, files.images)
    files.misnamed = [path for path in files.other if _begins_like_an_image(root / path)]
    files.other = sorted(set(files.other).difference(files.misnamed))
    for names in (files.images, files.tables, files.texts, files.json, files.labels, files.archives, files.unreadable):
        names.sort()
    return files


def _kinds() -> dict[str, str]:
    """Return the field of `FolderFiles` for each extension."""
    kinds = dict.fromkeys(UNREADABLE_SUFFIXES, "unreadable") | dict.fromkeys(ARCHIVE_SUFFIXES, "archives")
    kinds |= dict.fromkeys(TABLE_SUFFIXES, "tables") | dict.fromkeys(CAPTION_SUFFIXES, "texts") | {".json": "json"}
    kinds[".cls"] = "labels"
    return kinds | dict.fromkeys(image_suffixes(), "images")


def _is_link_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a loop
        return False


def _begins_like_an_image(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(12)
        return start.startswith(_MAGIC) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")
    return False


def _check_names(root: Path, images: Sequence[str]) -> None:
    for name in images:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"the file {root / name} has a name that is not UTF-8; rename it") from None


@dataclass(frozen=True)
class Layout:
    """Splits and classes of images, by their folders."""

    split_level: int | None
    """Number of the folder in each path that names the split, from 0; None without splits"""
    classes: tuple[str, ...] = ()
    """Names of the classes in order; empty without classes"""
    remarks: tuple[str, ...] = ()
    """Sentences on what could have been expected otherwise"""

    def split_of(self, image: str | None) -> str:
        """Return the split of an image; "train" if the folder has no splits, or a path names none."""
        folders = folders_of(image or "")
        if self.split_level is None or self.split_level >= len(folders):
            return "train"
        return SPLIT_NAMES.get(folders[self.split_level].lower(), "train")

    def class_of(self, image: str | None) -> str | None:
        """Return the name of the class of an image, or None without one."""
        folders = _without(folders_of(image or ""), self.split_level)
        return folders[-1] if folders and folders[-1] in self._known_classes else None

    @functools.cached_property
    def _known_classes(self) -> frozenset[str]:
        """The classes, to look one up in the same time for any number of them."""
        return frozenset(self.classes)


def folders_of(path: str) -> tuple[str, ...]:
    """Return the folders of a path, from the outermost: ("train", "cat") for train/cat/0.png.

    An unpacked archive is a folder only if it has the name of a split: train.zip is one, but not the shard 00001.tar.
    """
    return _folders_of_folder(path.rpartition("/")[0])


@functools.lru_cache(maxsize=65_536)  # there are far fewer folders than images
def _folders_of_folder(folder: str) -> tuple[str, ...]:
    parts = PurePosixPath(folder).parts
    if not any(map(is_archive, parts)):
        return parts
    names = (part.partition(".")[0] if is_archive(part) else part for part in parts)
    return tuple(name for name, part in zip(names, parts, strict=True) if name == part or name.lower() in SPLIT_NAMES)


def layout_of(images: Sequence[str], root: str) -> Layout:
    """Return the splits and classes of a folder.

    A folder with the name of a split is one if all images are in such folders, at the same depth. Otherwise it is a
    folder like the others: a class of trains, or of tests.

    Args:
        images: paths of all images.
        root: the folder, for messages.

    Raises:
        UserError: there are folders of several splits, and images outside of them.
    """
    counts = Counter(folders_of(image) for image in images)
    level = _split_level(counts)
    remarks = []
    if level is None:
        remarks = _unused_split_names(counts, root)
    paths = {folders: _without(folders, level) for folders in counts}
    classes = sorted({path[-1] for path in paths.values() if path})
    depths = Counter[int]()
    for folders, count in counts.items():
        depths[len(paths[folders])] += count
    if len(depths) == 1 and len(classes) > 1:
        return Layout(level, tuple(classes), tuple(remarks))
    if level is not None:
        names = sorted({folders[level] for folders in counts})
        remarks.append(f"{_listed('folder', names)} read as splits, not as classes")
    if len(depths) > 1:
        places = ", ".join(f"{count:,} {_at_depth(depth)}" for depth, count in sorted(depths.items()))
        remarks.append(
            f"The folders are not read as classes, because the images are at different depths ({places}); for classes, "
            "put each image into one folder named after its class"
        )
    return Layout(level, (), tuple(remarks))


def _split_level(folders: Iterable[tuple[str, ...]]) -> int | None:
    paths = list(folders)
    for level in range(min(map(len, paths), default=0)):
        if all(path[level].lower() in SPLIT_NAMES for path in paths):
            return level
    return None


def _without(folders: tuple[str, ...], level: int | None) -> tuple[str, ...]:
    return folders if level is None else (*folders[:level], *folders[level + 1 :])


def _listed(noun: str, names: Sequence[str]) -> str:
    """Return "The folder a is" or "The folders a, b are"."""
    return f"The {noun} {names[0]} is" if len(names) == 1 else f"The {noun}s {', '.join(names)} are"


def _at_depth(depth: int) -> str:
    if depth == 0:
        return "in the folder itself"
    return "in its subfolders" if depth == 1 else f"in subfolders {depth} levels down"


def _unused_split_names(counts: Counter[tuple[str, ...]], root: str) -> list[str]:
    """Return a remark about folders that have the name of a split but are none. Raises UserError for several splits."""
    inside: dict[str, tuple[str, int]] = {}  # split -> (its first folder, its number of images)
    outside = 0
    for folders, count in sorted(counts.items()):
        at = next((i for i, name in enumerate(folders) if name.lower() in SPLIT_NAMES), None)
        if at is None:
            outside += count
            continue
        split = SPLIT_NAMES[folders[at].lower()]
        first, number = inside.get(split, ("/".join(folders[: at + 1]), 0))
        inside[split] = (first, number + count)
    if not inside:
        return []
    names = " and ".join(f"{first} ({number:,} images)" for first, number in inside.values())
    if len(inside) > 1:
        others = f"{outside:,} other images are outside of them" if outside else "they are at different depths"
        raise UserError(
            f"{root} has the folders {names}, whose names are those of splits, but {others}; move every image into the "
            "folder of a split, or rename these folders if they are not splits, or give one folder alone: "
            f"{Path(root) / next(iter(inside.values()))[0]}"
        )
    first = next(iter(inside.values()))[0]
    where = f"{outside:,} images are outside of it" if outside else "such folders are at different depths"
    return [
        f"The folder {first} has the name of a split, but is read like any other folder, because {where}; to use it "
        f"alone, give {Path(root) / first}"
    ]
