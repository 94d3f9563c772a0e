"""The checkpoints that `checkpoints/latest` and `checkpoints/best` name, on any file system.

They are symbolic links where the file system has them. Elsewhere (exFAT, network shares, Windows, synced folders) each
is a small file that contains the name of a checkpoint. Programs that copy a run may turn links into such files or into
whole folders, or leave them out.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

LINKS = ("latest", "best")
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
STATE_FILE = "trainer_state.json"
_STEP = re.compile(r"step-(\d+)")
_MOST_BYTES = 64  # of a file that names a checkpoint


def follow_links(path: str | Path) -> Path:
    """Return `path` with `checkpoints/latest` and `checkpoints/best` in it replaced by the checkpoint that they name.

    Use it for each path that a user may give: `runs/x/checkpoints/best/pipeline` then works on every file system. A
    symbolic link, a folder, and a path without these names are returned as they are, with `~` expanded.
    """
    path = Path(os.path.expanduser(path))
    for depth, name in enumerate(path.parts):
        if name in LINKS:
            link = Path(*path.parts[: depth + 1])
            if (target := _named(link)) is not None:
                return follow_links(Path(target, *path.parts[depth + 1 :]))
    return path


def follow_links_or_name(name_or_path: str) -> str:
    """Like `follow_links`, for an argument that may also be the name of a Hub repository, which is not changed."""
    followed = follow_links(name_or_path)
    return name_or_path if followed == Path(name_or_path) else str(followed)


def linked_checkpoint(checkpoints: Path, name: str) -> Path | None:
    """Return the folder of the checkpoint `latest` or `best`; None if there is none.

    A folder of that name that is a copy of a checkpoint leads to this checkpoint.
    """
    folder = follow_links(checkpoints / name)
    if not folder.is_dir():
        return None
    if folder.is_symlink():
        target = checkpoints / os.path.basename(os.path.realpath(folder))
        return target if os.path.realpath(target) == os.path.realpath(folder) else folder
    if folder.name in LINKS and (manifest := _content(folder / MANIFEST)):
        same = (step for step in steps_in(checkpoints) if _content(step / MANIFEST) == manifest)
        return next(same, folder)
    return folder


def steps_in(checkpoints: Path) -> list[Path]:
    """Return the folders of checkpoints (`step-00001000`), newest first."""
    found = [(int(match[1]), path) for path in checkpoints.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def _named(link: Path) -> Path | None:
    """Return the checkpoint that `link` names as a file, or would name if a copy of the run had not lost it."""
    if link.is_dir():
        return None
    if link.is_file():
        text = (_content(link, _MOST_BYTES) or b"").decode("utf-8", errors="replace").strip()
        if _STEP.fullmatch(text) and (link.parent / text).is_dir():
            return link.parent / text
    steps = steps_in(link.parent) if link.parent.name == CHECKPOINTS else []
    if steps and link.name == "best":
        best = link.parent / f"step-{_best_step(steps[0]):08d}"
        return best if best in steps else None
    return steps[0] if steps else None


def _best_step(checkpoint: Path) -> int:
    try:
        return int(json.loads((_content(checkpoint / STATE_FILE) or b"").decode("utf-8"))["best_step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0


def _content(path: Path, most: int = -1) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError:
        return None
