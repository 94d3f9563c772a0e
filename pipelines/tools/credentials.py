"""Masks access tokens in everything that commands print and write."""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "***"
# Variables whose values are masked wherever they appear.
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SHORTEST_VALUE = 8  # a shorter value of a variable is not a token, and could be a part of any word
_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_(?:oauth_[\w.-]{20,}|[A-Za-z0-9]{20,})")
_ASSIGNED = re.compile(r"(\bWANDB_API_KEY\s*[=:]\s*)(?!\*)[^\s\"',]+")

_REMEMBERED: set[str] = set()


def remember_credential(secret: str) -> None:
    """Mask this text from now on, whatever it looks like; for a token that was read from a file."""
    if len(secret) >= _SHORTEST_VALUE:
        _REMEMBERED.add(secret)


def mask_credentials(value: Any) -> Any:
    """Return `value` with `***` in place of each access token in its strings.

    Masked are Hub tokens (`hf_` and at least 20 letters and digits), the values of HF_TOKEN and WANDB_API_KEY, what
    was passed to `remember_credential`, and what is assigned to WANDB_API_KEY in a text.

    Args:
        value: a string, a dict or a list; dicts and lists may be nested. Any other value is returned as it is.
    """
    if isinstance(value, dict):
        return {mask_credentials(key): mask_credentials(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([mask_credentials(entry) for entry in value])
    if not isinstance(value, str):
        return value
    for secret in (*_REMEMBERED, *(os.environ.get(name, "").strip() for name in _VARIABLES)):
        if len(secret) >= _SHORTEST_VALUE:
            value = value.replace(secret, MASK)
    return _ASSIGNED.sub(rf"\1{MASK}", _TOKEN.sub(MASK, value))
