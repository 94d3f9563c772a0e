"""Reading YAML files of settings, and those that they name as their base.

Each problem with a file itself gives one message with the same words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipelines.tools.cli import UserError, located, one_line
from pipelines.tools.files import read_text
from pipelines.tools.resources import PRESETS, find_shipped

BASE = "base"
"""Key of a config file that names the files whose settings it begins with"""
_MOST_VALUES = 100_000


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings of a YAML file.

    Raises:
        UserError: the file cannot be read, is empty, not UTF-8 or not YAML, contains something other than settings, or
            gives a setting twice (YAML would silently use the last one).
    """
    try:
        values = yaml.load(read_text(path), _Loader)
    except OSError as error:
        raise UserError(f"the config file {located(path)} cannot be read ({error.strerror}); check its path") from None
    except yaml.YAMLError as error:
        raise _unusable(path, _reason(error)) from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a date that does not exist
        raise _unusable(path, one_line(error, 200)) from None
    if values is None:
        raise _unusable(path, "it is empty")
    if _is_too_large(values):
        raise _unusable(path, "its values refer to themselves, or are far too many")
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise _unusable(path, "it does not consist of named settings")
    return values


def settings_chain(path: str | Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Return a config file and those that it begins with, each with its own settings, without the key `base`.

    The last file is `path` itself. Settings of later files replace those of earlier ones: the nearest file wins, and of
    several bases the last one.

    Args:
        above: the files that led to this one.

    Raises:
        UserError: a file cannot be read (see `read_settings`), does not exist, or is a base of itself.
    """
    path = Path(path)
    if path.resolve() in [file.resolve() for file in above]:
        circle = " → ".join(str(file) for file in (*above, path))
        raise UserError(f"the config file {path} is a base of itself ({circle}); remove one of these `{BASE}` keys")
    settings = read_settings(path)
    names = settings.pop(BASE, None)
    bases = [names] if isinstance(names, str) else names or []
    if not isinstance(bases, list) or not all(isinstance(name, str) and name for name in bases):
        raise UserError(f"`{BASE}` in {path} is {one_line(names, 100)}; give the name of a file, or a list of names")
    chain = [file for name in bases for file in settings_chain(_base(name, path), (*above, path))]
    return [*chain, (path, settings)]


def read_merged_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings of a config file together with those of its bases. Raises UserError."""
    merged: dict[str, Any] = {}
    for _, settings in settings_chain(path):
        merged = _merged(merged, settings)
    return merged


def _merged(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return settings of which those of a group are merged; `prepare` is a single value."""
    merged = earlier | later
    for name in earlier.keys() & later.keys():
        if name != "prepare" and isinstance(earlier[name], dict) and isinstance(later[name], dict):
            merged[name] = _merged(earlier[name], later[name])
    return merged


def _base(name: str, file: Path) -> Path:
    """Return the file that `base` names: relative to the file that names it, or a preset."""
    own = file.parent / Path(name).expanduser()
    if own.is_file():
        return own
    try:
        return find_shipped(name, [PRESETS])
    except UserError:
        raise UserError(
            f"`{BASE}` in {file} names {name}, but neither the file {located(own)} nor a preset of this name exists; "
            f"write the path relative to {file.name}"
        ) from None


class _Loader(yaml.SafeLoader):
    """Refuses keys that occur twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _is_too_large(values: Any) -> bool:
    """Return whether there are too many values: aliases (`*name`) multiply them, and may refer to themselves."""
    waiting, count = [values], 0
    while waiting and count <= _MOST_VALUES:
        value, count = waiting.pop(), count + 1
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
    return count > _MOST_VALUES


def _reason(error: yaml.YAMLError) -> str:
    """Return what is wrong and in which line; a tab is what most often is."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    if "'\\t'" in str(problem):
        problem = "there is a tab; use spaces"
    return one_line(f"line {mark.line + 1}: {problem}" if mark else problem, 200)


def _unusable(path: str | Path, reason: str) -> UserError:
    return UserError(f"the config file {path} cannot be used ({reason}); write one `name: value` per line")
