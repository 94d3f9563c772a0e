"""Checks of arguments that several pipelines take; each error quotes the argument and its value.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OUTPUT_TYPES = ("pil", "np", "pt")


def check_output_type(output_type: str, known: Sequence[str] = OUTPUT_TYPES) -> None:
    """Raise a ValueError for an unknown `output_type`."""
    if output_type not in known:
        raise ValueError(f"`output_type` must be one of {', '.join(known)}, but is {output_type!r}")


def check_positive_integers(**values: Any) -> None:
    """Raise a ValueError for the first of `values` that is not a positive integer."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, but is {value!r}")
