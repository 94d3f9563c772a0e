"""Find the files that are shipped with the code: presets, briefs, model card templates, Accelerate configs.

In a checkout they are next to the packages (`configs/`, `model_cards/`); an installed copy has them inside
`halftone_trainer` (see setup.py). In both they are named by their paths in the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .cli import UserError, located, nearest

DISTRIBUTION = "halftone-trainer"
CODE = Path(__file__).resolve().parent.parent.parent
"""The folder that contains the packages: the repository, or site-packages."""
_IN_PACKAGE = CODE / "halftone_trainer"
IS_CHECKOUT = not (_IN_PACKAGE / "configs").is_dir()
"""Whether the code is used from the repository, as with an editable install."""
_SHIPPED = CODE if IS_CHECKOUT else _IN_PACKAGE
_FOLDERS = ("configs", "model_cards")
PRESETS = "configs/experiments"
BRIEFS = "configs/briefs"


def own_version() -> str:
    """Return the installed version, or an empty string for a checkout that is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return ""


def shipped_path(path: str) -> Path:
    """Return the location of a shipped file or folder, given its path in the repository."""
    return _SHIPPED / path


def shipped_files() -> list[str]:
    """Return the paths in the repository of all shipped files."""
    files = (
        file for folder in _FOLDERS for file in shipped_path(folder).rglob("*") if file.suffix in (".yaml", ".jinja")
    )
    return sorted(file.relative_to(_SHIPPED).as_posix() for file in files)


def find_file(name: str | Path, folder: str = PRESETS) -> Path:
    """Return the user's own file at the path `name` if it exists, and otherwise the shipped file of that name.

    Raises:
        UserError: If there is neither; see `find_shipped`.
    """
    own = Path(name).expanduser()
    if own.is_dir():
        raise UserError(f"{located(name)} is a folder; name a file in it")
    return own if own.is_file() else find_shipped(str(name), [folder])


def find_shipped(name: str, folders: Sequence[str]) -> Path:
    """Return a shipped file, given its path in the repository or its name in one of `folders`, `.yaml` being optional.

    Raises:
        UserError: If the file does not exist; the message suggests the nearest name.
    """
    files = shipped_files()
    path = Path(name).as_posix()
    for candidate in (path, *(f"{folder}/{path.removesuffix('.yaml')}.yaml" for folder in folders)):
        if candidate in files:
            return shipped_path(candidate)
    known = [
        file.removeprefix(f"{folder}/").removesuffix(".yaml")
        for folder in folders
        for file in files
        if file.startswith(f"{folder}/")
    ]
    path = path.removeprefix(f"{folders[0]}/").removesuffix(".yaml")
    raise UserError(
        f"found no file {located(name)}, and Halftone does not ship one of that name{nearest(path, known)} "
        "(`halftone path` lists the shipped files)"
    )
