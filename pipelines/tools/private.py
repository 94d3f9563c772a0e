"""What is private in the files of a run: access tokens, and the home folder, which is named after its user.

`without_private` is applied to every text and setting that is written into a run folder or given to a tracker. A path
below the home folder is written as `~/…`, and `expand_home` makes it a path again where settings are read.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

from .credentials import mask_credentials


def without_private(value: Any) -> Any:
    """Return `value` with access tokens masked, and with `~` in place of the home folder in its strings.

    Args:
        value: a string, a dict or a list; dicts and lists may be nested. Any other value is returned as it is.
    """
    home = _home_pattern(os.path.expanduser("~"))
    masked = mask_credentials(value)
    return masked if home is None else _in_strings(masked, lambda text: home.sub("~", text))


def expand_home(value: Any) -> Any:
    """Return `value` with the path of the home folder in each of its strings that begins with `~/`."""
    return _in_strings(value, lambda text: os.path.expanduser(text) if re.match(r"~([/\\\\]|$)", text) else text)


@functools.lru_cache(maxsize=8)
def _home_pattern(home: str) -> re.Pattern[str] | None:
    """Return a pattern of the home folder in all its spellings; None if there is no home folder of its own."""
    if not os.path.isabs(home) or os.path.dirname(home) == home:
        return None
    paths = {home, os.path.realpath(home)}
    spellings = {path.rstrip("/\\") for path in paths} | {path.rstrip("/\\").replace("\\", "/") for path in paths}
    longest_first = sorted(map(re.escape, spellings), key=len, reverse=True)
    # Neither the end of a longer path, such as /mnt/home/me, nor the beginning of another name, such as /home/me2.
    return re.compile(
        rf"(?<![\w.~-])(?:{'|'.join(longest_first)})(?![\w@+~-]|\.\w)", re.IGNORECASE if os.name == "nt" else 0
    )


def _in_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {_in_strings(key, change): _in_strings(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_in_strings(entry, change) for entry in value])
    return change(value) if isinstance(value, str) else value
