"""What may be in a caption, whoever wrote it."""

from __future__ import annotations

from typing import Any

from pipelines.tools.cli import CONTROL_CHARACTERS

MAX_CAPTION_CHARACTERS = 20_000
"""A longer text is not a caption, but a whole file. Models read some hundred tokens."""


def caption_problem(captions: Any) -> str | None:
    """Return why these captions cannot be trained on, or None if they can."""
    texts = captions if isinstance(captions, list) else [captions]
    if not texts or any(text is None for text in texts):
        return "the caption is missing"
    if not all(isinstance(text, str) for text in texts):
        return f"the caption is a {type(texts[0]).__name__}, not a text"
    longest = max(map(len, texts))
    if longest > MAX_CAPTION_CHARACTERS:
        return f"the caption has {longest:,} characters; the limit is {MAX_CAPTION_CHARACTERS:,}"
    return None if all(cleaned_caption(text).strip() for text in texts) else "the caption is empty"


def cleaned_caption(text: str) -> str:
    """Return a caption without control characters, which can manipulate a terminal. Line ends become spaces."""
    return CONTROL_CHARACTERS.sub(lambda match: _replacement(match[0]), text)


def _replacement(character: str) -> str:
    if character == "\r":  # part of a line break on Windows
        return character
    return " " if character.isspace() else ""
