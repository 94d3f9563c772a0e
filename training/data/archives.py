"""Archives of images and captions, which are unpacked once and then read like folders.

Unpacked files are kept in the cache folder of `datasets`, under a key that contains the path, size and modification
time of the archive. An archive may come from anybody: only plain files are unpacked, and only below that folder.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, NamedTuple

from pipelines.tools.cli import UserError, one_line, printable
from training.data.records import cache_file, files_state

READABLE_ARCHIVES = (
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz"),
    *(".tar.gz", ".tar.bz2", ".tar.xz"),
)
_SPARE = 64 * 2**20  # bytes of the disk that are left free
_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError),
    NotImplementedError,  # a method of compression that Python does not have
)


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    size: int
    is_plain: bool
    """Whether it is neither a link nor a device"""
    opened: Callable[[], IO[bytes]]


def is_archive(name: str | Path) -> bool:
    """Return whether a file has the extension of an archive that can be unpacked."""
    return str(name).lower().endswith(READABLE_ARCHIVES)


def unpacked_folder() -> Path:
    """Return the folder with everything that has been unpacked."""
    return cache_file("", "").parent / "unpacked"


def is_unpacked(folder: Path) -> bool:
    """Return whether a folder was made from archives."""
    return folder.parent == unpacked_folder()


def unpacked(archive: Path) -> Path:
    """Return a folder with the files of an archive, which is unpacked if it has changed or was never unpacked.

    Raises:
        UserError: the archive is damaged or encrypted, contains links or paths that lead out of the folder, or does not
            fit on the disk.
    """
    return _made(archive, files_state(archive), lambda folder: _unpack(archive, folder))


def with_archives_unpacked(root: Path, state: str) -> Path:
    """Return a folder like `root` in which each archive is a folder of the same name; `root` if it has no archives.

    The other files are links to those in `root`, or copies on disks without links.

    Args:
        state: `files_state` of `root`.

    Raises:
        UserError: see `unpacked`.
    """
    if not any(is_archive(file) for file in _files_below(root)):
        return root

    def make(folder: Path) -> None:
        for file in _files_below(root):
            if is_archive(file):
                (folder / file).mkdir(parents=True)
                _unpack(root / file, folder / file)
            else:
                _link(root / file, folder / file)

    return _made(root, state, make)


def linked_folder(root: Path, state: str) -> Path:
    """Return a folder with links to all files of `root`, whose own path has no unusual characters."""

    def make(folder: Path) -> None:
        for file in _files_below(root):
            _link(root / file, folder / file)

    return _made(root, state, make)


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(os.path.realpath(file))
    except OSError:  # Windows allows links only to some users
        shutil.copy2(file, link)


def _files_below(root: Path) -> Iterator[str]:
    """Yield the paths of files, and of links to folders, below `root`; hidden folders and archives are left out."""
    for folder, folders, names in os.walk(root):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in (*linked, *names):
            if not (name.startswith(".") and is_archive(name)):
                yield os.path.relpath(os.path.join(folder, name), root)


def _made(source: Path, state: str, make: Callable[[Path], None]) -> Path:
    """Return the folder for this state of a source; it is made beside its place and renamed when it is complete."""
    from filelock import FileLock

    name = re.sub(r"[^\w.-]", "_", source.name)[:80]  # without characters of patterns, which `datasets` would expand
    target = unpacked_folder() / f"{name}-{state[:16]}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # of several processes, one unpacks
            if not target.is_dir():
                partial = target.with_name(f".{target.name}")
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                partial.mkdir()
                with _removed_on_error(partial):
                    make(partial)
                    partial.rename(target)
    except OSError as error:
        raise UserError(
            f"{source} cannot be unpacked into {target.parent} ({one_line(error, 300)}); make space there, set the "
            "environment variable HF_HOME to another folder, or unpack it yourself and give the folder instead"
        ) from None
    return target


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _unpack(archive: Path, folder: Path) -> None:
    try:
        opened = _zip_members(archive) if archive.name.lower().endswith(".zip") else _tar_members(archive)
        made: set[Path] = set()
        for member in opened:
            path = _safe_path(archive, member)
            if path is None:
                continue
            _require_space(archive, member, folder)
            target = folder / path
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            with member.opened() as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
    except _DAMAGED as error:
        raise UserError(
            f"the archive {archive} cannot be read ({one_line(error, 200) or type(error).__name__}); it is damaged or "
            "incomplete: download or make it again"
        ) from None


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if info.flag_bits & 1:
                raise UserError(f"the archive {archive} is encrypted; unpack it, and give the folder instead")
            kind = stat.S_IFMT(info.external_attr >> 16)
            if not info.is_dir():
                yield Member(
                    info.filename, info.file_size, kind in (0, stat.S_IFREG), functools.partial(opened.open, info)
                )


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive, encoding="utf-8") as opened:
        for info in opened:
            if not info.isdir():
                yield Member(info.name, info.size, info.isreg(), functools.partial(_regular, opened, info))


def _regular(opened: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = opened.extractfile(info)
    assert file is not None  # it is a plain file
    return file


def _safe_path(archive: Path, member: Member) -> PurePosixPath | None:
    """Return the path at which a file is unpacked; None without a name. Raises UserError for unsafe paths."""
    written = member.name.replace("\\", "/")
    path = PurePosixPath(written)
    if path.is_absolute() or PureWindowsPath(written).drive or ".." in path.parts or "\0" in written:
        problem = "which leads out of the folder that it is unpacked in"
    elif not member.is_plain:
        problem = "which is a link or a device, not a file"
    else:
        return path if path.parts else None
    raise UserError(
        f"the archive {archive} contains {printable(member.name)}, {problem}; it is not unpacked: remove it, or "
        "unpack the archive yourself and give the folder instead"
    )


def _require_space(archive: Path, member: Member, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if member.size + _SPARE > free:
        raise UserError(
            f"the archive {archive} does not fit on the disk: {printable(member.name)} has {member.size / 2**20:,.0f} "
            f"MiB, and {free / 2**20:,.0f} MiB are free in {unpacked_folder()}; make space there, or set the "
            "environment variable HF_HOME to a folder on another disk"
        )
