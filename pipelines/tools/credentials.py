"""Masks access tokens in everything that commands print and write."""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "***"
# Variables whose values are masked wherever they appear.
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SHORTEST_VALUE = 8  # a shorter value of a variable is not a token, and could be a part of any word
_TOKENS = (
    re.compile(r"(?<![A-Za-z0-9])hf_(?:oauth_[\w.-]{20,}|[A-Za-z0-9]{20,})"),
    # Keys of GitHub, GitLab, OpenAI and similar services, Slack, Google and Amazon.
    re.compile(r"(?<![A-Za-z0-9])(?:gh[oprsu]_|github_pat_|glpat-|sk-|xox[abprs]-|AIza)(?=[\w-]*\d)[\w-]{20,}"),
    re.compile(r"(?<![A-Za-z0-9])A[KS]IA[0-9A-Z]{16}(?![A-Za-z0-9])"),
)
# What precedes a secret in a text; the secret is masked, whatever it looks like.
_PRECEDED = (
    re.compile(r"(\bWANDB_API_KEY\s*[=:]\s*)(?!\*)[^\s\"',]+"),
    # A word with a digit, so that "the bearer of good news" is kept.
    re.compile(r"(\bBearer\s+)(?=[\w.~+/=-]*\d)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:]+:[^\s/@]+(?=@)", re.IGNORECASE),  # https://user:password@host
)

_REMEMBERED: set[str] = set()


def remember_credential(secret: str) -> None:
    """Mask this text from now on, whatever it looks like; for a token that was read from a file."""
    if len(secret) >= _SHORTEST_VALUE:
        _REMEMBERED.add(secret)


def mask_credentials(value: Any) -> Any:
    """Return `value` with `***` in place of each access token in its strings.

    Masked are Hub tokens (`hf_` and at least 20 letters and digits) and the keys of other services that have a known
    form, the values of HF_TOKEN and WANDB_API_KEY, what was passed to `remember_credential`, what is assigned to
    WANDB_API_KEY in a text, what follows `Bearer`, and the user and password in a URL.

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
    for token in _TOKENS:
        value = token.sub(MASK, value)
    for secret_after in _PRECEDED:
        value = secret_after.sub(rf"\1{MASK}", value)
    return value
