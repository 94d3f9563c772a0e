"""What may be published of a run: texts and settings without local paths and access tokens, written as plain text.

Captions, class labels, prompts, names of datasets and runs come from other people's files. In a model card they must
not become links, images or HTML, and must not end a code block.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.tools.cli import one_line
from pipelines.tools.credentials import mask_credentials

SECRET_KEYS = re.compile(r"(^|_)(token|token_file|api_key|password|secret)$")
LONGEST_TEXT, LONGEST_SETTING = 500, 2000  # characters of a caption and of a setting in a model card
HOME = "home folder"

# Unicode categories: control characters, line and paragraph separators, formatting (direction of writing, zero width),
# halves of surrogate pairs, private use, unassigned.
_HIDDEN = ("Cc", "Zl", "Zp", "Cf", "Cs", "Co", "Cn")
_PATH_CHARACTERS = r"[^\s\"'`<>|,;)\]}]"
# The beginnings of local paths: of a folder above this one, a URL of a file, a drive of Windows, a network share, the
# home folder, and an absolute path with at least two parts (because `/` also separates words).
_LOCAL_PATH = re.compile(
    rf"(?<![\w.])(\.\.[\\/])+{_PATH_CHARACTERS}*|"
    rf"file:/+{_PATH_CHARACTERS}*"
    rf"|(?<![\w])[A-Za-z]:[\\/]{_PATH_CHARACTERS}*"
    rf"|\\\\{_PATH_CHARACTERS}+"
    rf"|(?<![\w.~-])~[\w.-]*[\\/]{_PATH_CHARACTERS}*"
    rf"|(?<![\w.:/\\~-])/[\w.@+~-]+/{_PATH_CHARACTERS}*",
    re.IGNORECASE,
)
_HOME = re.compile(r"(/home|/Users|[A-Za-z]:[\\/](Users|Documents and Settings))[\\/][^\\/]*", re.IGNORECASE)
# Text that no dialect of Markdown takes for anything else: words with simple punctuation between them. A full stop
# inside a word could make it a link (example.com), and a number at the beginning could make it a list.
_PLAIN = re.compile(r"(?!\d+[.)] )[^\W_]+(?:(?:[,.;]? |[-'+_]| [&+-] |(?<=\d)[.,](?=\d))[^\W_]+)*[.!?]?")


def is_local_path(text: str) -> bool:
    """Return whether a value of a setting is a path that means something on this machine only.

    Relative paths such as `data/posters` are not local: they say nothing about the machine.
    """
    return bool(re.match(r"\.\.(/|\\|$)|/|\\|~[\w.-]*(/|\\|$)", text) or _LOCAL_PATH.match(text))


def folder_name(path: str) -> str:
    """Return the last part of a path in any spelling: /a/b, ~/b, file:///a/b, C:\\a\\b, \\\\server\\b.

    A home folder is named after its user, so `home folder` is returned for it.
    """
    path = re.sub(r"^file:/*(?=/|[A-Za-z]:)", "", path.strip())
    trimmed = path.rstrip("/\\")
    if _HOME.fullmatch(trimmed) or trimmed == str(Path.home()) or re.fullmatch(r"~[^/\\]*|/?root", trimmed):
        return HOME
    return re.split(r"[/\\]+", trimmed)[-1]


def public_text(text: str) -> str:
    """Return `text` with access tokens masked, and with each local path in it cut to its last part."""
    return _LOCAL_PATH.sub(lambda match: folder_name(match[0]), mask_credentials(text))


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without secrets and empty values, and with local paths cut to their last part."""
    return {
        public_text(str(name)[:LONGEST_TEXT]): public_value(value)
        for name, value in settings.items()
        if not SECRET_KEYS.search(str(name)) and value is not None and value not in ("", [], {}) and name != "prepare"
    }


def public_value(value: Any) -> Any:
    """Return a value of the settings, or a nested part of it, with local paths cut to their last part."""
    if isinstance(value, Mapping):
        return public_settings(value)
    if isinstance(value, (list, tuple)):
        return [public_value(item) for item in value]
    if isinstance(value, (bool, int, float)):
        return value
    text = str(value)[:LONGEST_SETTING]
    return folder_name(text) if is_local_path(text) else public_text(text)


def settings_elsewhere(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that mean the same on another machine: without secrets, and without those with a path that
    exists only on this one."""
    return {
        name: value
        for name, value in settings.items()
        if not SECRET_KEYS.search(name) and name not in ("prepare", "output_dir") and not _holds_path(value)
    }


def _holds_path(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_path(part) for part in [*value.keys(), *value.values()])
    if isinstance(value, (list, tuple)):
        return any(_holds_path(part) for part in value)
    return isinstance(value, str) and (is_local_path(value) or public_text(value) != value or _exists(value))


def _exists(value: str) -> bool:
    try:
        return bool(value) and Path(value).exists()
    except (OSError, ValueError):  # longer than a path can be, or with a null character
        return False


def visible(text: str, keep: str = "\n") -> str:
    """Return `text` without characters that are not shown or that change how others are shown; control characters
    become spaces, except those in `keep`."""
    categories = {c: unicodedata.category(c) for c in set(text) if c not in keep}
    hidden = {ord(c): " " if kind in ("Cc", "Zl", "Zp") else "" for c, kind in categories.items() if kind in _HIDDEN}
    return text.translate(hidden)


def clean(text: Any) -> str:
    """Return text from data on one line of at most 500 characters, without what is private and without control
    characters and the marks that reverse the direction of writing."""
    line = public_text(one_line(visible(str(text)[: 4 * LONGEST_TEXT], keep="")))
    return line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 1] + "…"


def literal(text: Any) -> str:
    """Return Markdown that shows `text` from data as it is: simple words unchanged, anything else as a code span.

    Within a code span nothing is a link, an image or HTML.
    """
    line = clean(text)
    if not line or _PLAIN.fullmatch(line):
        return line
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    padding = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def cell(text: Any) -> str:
    """Return Markdown that shows `text` from data in a cell of a table, which `|` would end."""
    return literal(text).replace("|", "\\|")


def fenced(text: str, language: str = "") -> str:
    """Return a code block with a fence that is longer than any in `text`."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"
