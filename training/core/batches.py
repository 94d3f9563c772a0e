"""Fetching batches of a map-style dataset, and moving them to a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from training.core.draws import SampleKey
from training.core.stage import Batch, MapDataset


def fetch(data: MapDataset, keys: list[SampleKey]) -> Batch:
    """Return one batch; it equals the data loader's batch for the same keys."""
    items = data.__getitems__(keys) if hasattr(data, "__getitems__") else [data[key] for key in keys]
    return collate_function(data)(items)


def uniform_batches(data: MapDataset, rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield the rows in batches of at most `size`, each of rows of one group (see `MapDataset.batch_groups`)."""
    groups = getattr(data, "batch_groups", None)
    shares: list[Sequence[int]] = [rows]
    if groups is not None:
        own = groups[torch.tensor(list(rows), dtype=torch.int64)].tolist()
        shares = [[row for row, one in zip(rows, own, strict=True) if one == group] for group in sorted(set(own))]
    for share in shares:
        for start in range(0, len(share), size):
            yield share[start : start + size]


def collate_function(data: MapDataset) -> Any:
    return getattr(data, "collate", default_collate)


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a batch to the device; other values are unchanged."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value
