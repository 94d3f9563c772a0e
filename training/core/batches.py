"""Batches of a map-style dataset, as the data loader makes them, and their way to the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import default_collate

from training.core.draws import SampleKey
from training.core.stage import Batch, MapDataset


def fetch(data: MapDataset, keys: list[SampleKey]) -> Batch:
    """One batch, as the data loader would make it."""
    items = data.__getitems__(keys) if hasattr(data, "__getitems__") else [data[key] for key in keys]
    return collate_function(data)(items)


def collate_function(data: MapDataset) -> Any:
    return getattr(data, "collate", default_collate)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a batch on the device; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value
