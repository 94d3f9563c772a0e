"""Prompts and class labels as lists, one entry for each image.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .checks import is_integer


def as_list(value: Any) -> list:
    """Return the entries of a list, tuple, array or tensor; any other value is a single entry, and None is none."""
    if value is None:
        return []
    if isinstance(value, (Tensor, np.ndarray)):
        return value.reshape(-1).tolist()
    return list(value) if isinstance(value, (list, tuple, range)) else [value]


def length(value: Any) -> int:
    """Return the number of entries of prompts or labels, or of rows of embeddings (B L D)."""
    return len(value) if isinstance(value, Tensor) and value.ndim == 3 else len(as_list(value))


def is_text(value: Any) -> bool:
    """Whether `value` is a string that can be encoded, unlike one from a command line in another encoding."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def broadcast(values: list, count: int) -> list:
    """Repeat a list with a single entry `count` times; return other lists unchanged."""
    return values * count if len(values) == 1 else values


def broadcast_rows(embeds: Tensor, count: int) -> Tensor:
    """Repeat a tensor with a single row `count` times; return other tensors unchanged."""
    return embeds.expand(count, *embeds.shape[1:]) if len(embeds) == 1 else embeds


def is_empty(prompt: Any) -> bool:
    """Whether `prompt` is None or consists of empty strings: as a negative prompt, both mean the same."""
    entries = as_list(prompt)
    return prompt is None or (len(entries) > 0 and all(isinstance(text, str) and text == "" for text in entries))


def whole_numbers(names: Iterable[str]) -> dict[int, str]:
    """Return the class name of each number if all class names are whole numbers; otherwise an empty dict."""
    known = sorted(names, key=len, reverse=True)  # of "7" and "07", which are the same number, 7 names the first
    if not all(re.fullmatch("-?[0-9]{1,18}", name) for name in known):
        return {}
    return {int(name): name for name in known}


def class_ids(class_labels: Any, id2label: Mapping[str, str], classes: int) -> list[int]:
    """Convert class labels, given as ids or names, to class ids.

    Where all class names are whole numbers, such as years, an integer is a name and never an id.

    Raises:
        ValueError: a name is unknown, an id is out of range, or a label is neither.
    """
    ids_by_name = {name: int(id_) for id_, name in id2label.items()}
    numbers = whole_numbers(ids_by_name)
    ids = []
    for label in as_list(class_labels):
        if not (isinstance(label, str) or is_integer(label)):
            raise ValueError(f"`class_labels` must be class ids or class names, but has {label!r}")
        name = label if isinstance(label, str) else numbers.get(int(label)) if numbers else None
        if (numbers or isinstance(label, str)) and name not in ids_by_name:
            names = ", ".join(list(ids_by_name)[:20]) or "unnamed; pass class ids"
            raise ValueError(
                f"`class_labels` has {label!r}, which is not a class of this model; its classes are {names}"
            )
        id_ = int(label) if name is None else ids_by_name[name]
        if not 0 <= id_ < classes:
            raise ValueError(f"`class_labels` must be from 0 to {classes - 1}, but has {id_}")
        ids.append(id_)
    return ids


def reads_text(denoiser: Any) -> bool:
    """Whether a U-Net, or a transformer, attends to a text condition."""
    config = denoiser.config
    if "down_block_types" not in config:  # a transformer
        return config.get("cross_attention_dim") is not None
    blocks = [
        config.get("mid_block_type"),
        *(config.get("down_block_types") or ()),
        *(config.get("up_block_types") or ()),
    ]
    return any("CrossAttn" in block for block in blocks if block)
