"""The messages of a logger, whatever handlers and propagation other code has given it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def collected(name: str) -> Iterator[list[tuple[str, str]]]:
    """Collect level and text of the records of the logger `name` while the block runs."""
    messages: list[tuple[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
