"""The files that come with the code: presets, briefs, card templates, Accelerate configs.

In a checkout they lie beside the packages (`configs/`, `model_cards/`); an installed copy has them inside
`halftone_trainer` (see setup.py). They have the same names in both: their paths in the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .cli import UserError, nearest

DISTRIBUTION = "halftone-trainer"
CODE = Path(__file__).resolve().parent.parent.parent
"""The folder that the packages lie in: the repository, or site-packages."""
_IN_PACKAGE = CODE / "halftone_trainer"
IS_CHECKOUT = not (_IN_PACKAGE / "configs").is_dir()
"""Whether the code is used from the repository (an editable install included)."""
_SHIPPED = CODE if IS_CHECKOUT else _IN_PACKAGE
_FOLDERS = ("configs", "model_cards")
PRESETS = "configs/experiments"
BRIEFS = "configs/briefs"


def own_version() -> str:
    """The version that is installed; empty for a checkout that is not."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return ""


def shipped_path(path: str) -> Path:
    """Where a shipped file or folder lies; `path` is that in the repository, `configs/briefs/swiss.yaml`."""
    return _SHIPPED / path


def shipped_files() -> list[str]:
    """The paths in the repository of all shipped files."""
    files = (
        file for folder in _FOLDERS for file in shipped_path(folder).rglob("*") if file.suffix in (".yaml", ".jinja")
    )
    return sorted(file.relative_to(_SHIPPED).as_posix() for file in files)


def find_file(name: str | Path, folder: str = PRESETS) -> Path:
    """The file that `name` means, from whatever folder it is asked for: the user's own at that path, else a shipped
    one (`find_shipped`). Raises UserError."""
    own = Path(name).expanduser()
    return own if own.is_file() else find_shipped(str(name), [folder])


def find_shipped(name: str, folders: Sequence[str]) -> Path:
    """A shipped file, by its path in the repository, or in one of `folders`, there with or without `.yaml`.

    Raises:
        UserError: there is none of this name; the message names the nearest.
    """
    files = shipped_files()
    asked = Path(name).as_posix()
    for candidate in (asked, *(f"{folder}/{asked.removesuffix('.yaml')}.yaml" for folder in folders)):
        if candidate in files:
            return shipped_path(candidate)
    known = [
        file.removeprefix(f"{folder}/").removesuffix(".yaml")
        for folder in folders
        for file in files
        if file.startswith(f"{folder}/")
    ]
    asked = asked.removeprefix(f"{folders[0]}/").removesuffix(".yaml")
    raise UserError(
        f"there is no file '{name}', and none of that name comes with Halftone{nearest(asked, known)} "
        "(`halftone path` lists those that do)"
    )
