"""Fingerprints of the content of datasets and VAEs, the same on every machine and for every path.

N rows of a dataset.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.core.blocks import RowBlocks
from training.data.images import ImageDataset
from training.data.records import read_record, write_record
from training.data.shards.fetching import prefetch
from training.data.shards.places import is_place, read_place
from training.data.source import column_values

# The bytes of every image are read up to this number of rows; of a larger dataset, those of this number of evenly
# spaced images. A million images of 100 kB would take minutes at each start; 4,096 take a second or two.
SAMPLED_IMAGES = 4096
# Of a larger remote dataset, images of some evenly spaced blocks are read. Each image of a tar file is requested alone;
# in a Parquet file, its whole row group is received.
SAMPLED_BLOCKS, SAMPLED_IN_BLOCK = 16, 16
SAMPLED_VALUES = 65_536
_IMAGES_PER_READ = 64
# The values in a VAE's config that determine its latents or their scale.
_VAE_CONFIG_KEYS = (
    "latent_channels",
    "patch_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
)


def dataset_fingerprint(dataset: ImageDataset, poll: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 over the number of rows, all captions and labels, and the bytes of up to `SAMPLED_IMAGES`
    images and of their masks, if the dataset has any.

    It is independent of paths and of how the rows are stored (files, Parquet, Arrow). In a dataset with more rows than
    that, a change to images alone is detected only if it affects a sampled image, and the fingerprint depends on where
    the data are: of remote shards, fewer images are read (`SAMPLED_IN_BLOCK` images in each of `SAMPLED_BLOCKS`
    blocks) than of the same rows on the disk.

    Args:
        poll: called now and then; it may raise to stop.
    """
    names = dataset.label_map.names if dataset.label_map is not None else None
    columns = [dataset.image_columns, dataset.captions and dataset.config.caption_column, dataset.config.label_column]
    key = [dataset.stored_rows_key, *columns, names, dataset.map_columns, dataset.number_columns]
    known = read_record("fingerprint", key) if dataset.stored_rows_key else None
    if isinstance(known, str):
        return known
    fingerprint = _read_fingerprint(dataset, poll)
    if dataset.stored_rows_key:
        write_record("fingerprint", key, fingerprint)
    return fingerprint


def _read_fingerprint(dataset: ImageDataset, poll: Callable[[], None]) -> str:
    config, rows = dataset.config, len(dataset)
    digest = hashlib.sha256(f"{rows} rows".encode())
    if dataset.captions:
        for caption in column_values(dataset.dataset, config.caption_column):
            digest.update(json.dumps(caption).encode())
    if dataset.label_map is not None:
        digest.update(json.dumps(dataset.label_map.names).encode())
        for label in column_values(dataset.dataset, config.label_column):
            digest.update(f"{label}\n".encode())
    names = [*dataset.image_columns, *dataset.map_columns]
    for name in dataset.number_columns:
        for value in column_values(dataset.dataset, name):
            digest.update(json.dumps(value).encode())
    images = dataset.dataset.select_columns(names)
    sampled = evenly_spaced(rows, SAMPLED_IMAGES)
    if dataset.remote is not None and dataset.row_blocks is not None and rows > SAMPLED_IMAGES:
        sampled = list(itertools.chain.from_iterable(rows_of_some_blocks(dataset.row_blocks)))
    for start in range(0, len(sampled), _IMAGES_PER_READ):
        poll()
        columns = images[sampled[start : start + _IMAGES_PER_READ]]
        if dataset.remote is not None:
            prefetch((source for name in names for source in columns[name]), whole_blocks=len(sampled) == rows)
        for sources in zip(*(columns[name] for name in names), strict=True):
            for source in sources:
                digest.update(hashlib.sha256(encoded_bytes(source)).digest())
    return digest.hexdigest()


def vae_fingerprint(vae: torch.nn.Module) -> str:
    """Return the SHA-256 over a VAE's class, its weights (names, types, shapes, bytes) and its config's scaling."""
    config: Any = getattr(vae, "config", {})
    settings = {key: config.get(key) for key in _VAE_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps([type(vae).__name__, settings], default=list).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def module_fingerprint(*modules: torch.nn.Module) -> str:
    """Return the SHA-256 over the names, types and shapes of all weights, and up to `SAMPLED_VALUES` values of each.

    All weights of a large model would take seconds at each start; another training changes nearly all of them.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            values = tensor.detach().flatten()
            sampled = values[:: max(1, len(values) // SAMPLED_VALUES)].cpu().contiguous()
            digest.update(sampled.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 over a tokenizer's entries and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def evenly_spaced(rows: int, at_most: int) -> list[int]:
    """Return all row numbers, or `at_most` evenly spaced ones from the first to the last."""
    return list(range(rows)) if rows <= at_most else np.linspace(0, rows - 1, at_most).round().astype(int).tolist()


def rows_of_some_blocks(blocks: RowBlocks) -> list[list[int]]:
    """Return the numbers of up to `SAMPLED_IN_BLOCK` rows in each of up to `SAMPLED_BLOCKS` blocks, evenly spaced."""
    starts = blocks.starts.tolist()
    return [
        [starts[block] + row for row in evenly_spaced(starts[block + 1] - starts[block], SAMPLED_IN_BLOCK)]
        for block in evenly_spaced(len(starts) - 1, SAMPLED_BLOCKS)
    ]


def encoded_bytes(source: dict[str, Any]) -> bytes:
    """Return the image file of an undecoded `datasets.Image` value; empty if there is none."""
    if source is None:
        return b""
    if source.get("bytes") is not None:
        return source["bytes"]
    if is_place(source["path"]):
        return read_place(source["path"])
    path = Path(source["path"] or "")
    return path.read_bytes() if path.is_file() else b""
