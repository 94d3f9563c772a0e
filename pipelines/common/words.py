"""Words of prompts that the tokenizer of a model does not know.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger(__name__)

MOST_WORDS_NAMED = 10


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """Return the words of `text` that `tokenizer` replaces by its unknown token, each once, in their order.

    Punctuation is left out. A tokenizer with byte-level pieces knows every word.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    text = text.encode("utf-8", "replace").decode("utf-8")
    options = {"add_special_tokens": False, "truncation": False, "verbose": False}
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
        pieces = zip(encoded["input_ids"], encoded["offset_mapping"])
        words = [text[start:end] for id_, (start, end) in pieces if id_ == unknown]
    else:
        words = [word for word in text.split() if unknown in tokenizer(word, **options)["input_ids"]]
    return list(dict.fromkeys(word for word in words if any(map(str.isalnum, word))))


def warn_of_unknown_words(tokenizer: Any, texts: Iterable[str]) -> None:
    """Log a warning that names the unknown words of each text; one warning for each text in a process."""
    if not logger.isEnabledFor(logging.WARNING):
        return
    for text in texts:
        words = unknown_words(tokenizer, text)
        if words:
            _warn(text, tuple(words))


@functools.lru_cache(maxsize=1000)
def _warn(text: str, words: tuple[str, ...]) -> None:
    named = ", ".join(repr(word) for word in words[:MOST_WORDS_NAMED])
    named += f" and {len(words) - MOST_WORDS_NAMED} more" if len(words) > MOST_WORDS_NAMED else ""
    noun = "word" if len(words) == 1 else "words"
    logger.warning("the model does not know the %s %s of the prompt %r; use other words", noun, named, text)
