"""The files of a latent cache: posterior moments in memory-mapped shards, with captions, labels and masks beside them.

N rows, V variants (1, or 2 with the mirrored picture), C latent channels, h w latent cells, R resolution. `mean` and
`logvar` are in the VAE's raw units: noise is drawn, and latents are scaled, at every step and by the VAE's own config.

    PATH/cache.json                            what it was made from, and every shard with its size and SHA-256
    PATH/<split>/shard-00000.safetensors       mean, logvar N V C h w; label, row N; mask N R R (uint8; its mirrored one
                                               is made when it is read); captions (UTF-8) and their offsets
    PATH/<split>/shard-00000.json              says that the shard beside it is complete
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pipelines.tools.commands import command
from training.core.files import write_atomically, write_json
from training.objectives.segmentation import IGNORE_INDEX

# Masks and the label column's name came later, and are named only where they are not what they always were: caches
# without them are the same files as ever.
FORMAT_VERSION = 1
MANIFEST = "cache.json"
MAKER = command("data_scripts/precompute_latents.py")
# Several captions of one picture are kept in one field; no caption contains this.
_CAPTION_SEPARATOR = "\0"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a finished cache says of itself, or None."""
    file = folder / MANIFEST
    return json.loads(file.read_text()) if file.is_file() else None


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def read_shard(file: Path) -> dict[str, Tensor]:
    """A shard's tensors, mapped: pages are read when they are touched."""
    with safe_open(file, framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (it is no dict)


def captions_of_row(shard: dict[str, Tensor], row: int) -> str | list[str]:
    """The caption of a shard's row, or its captions where it has several."""
    start, stop = shard["caption_offsets"][row : row + 2].tolist()
    text = shard["captions"][start:stop].numpy().tobytes().decode()
    return text.split(_CAPTION_SEPARATOR) if _CAPTION_SEPARATOR in text else text


def write_shard(
    file: Path, tensors: dict[str, Tensor], captions: Sequence[str | list[str]] | None, request: str
) -> None:
    """Write a shard so that it is complete or not there, and then the note that says so."""
    if captions is not None:
        texts = [c if isinstance(c, str) else _CAPTION_SEPARATOR.join(c) for c in captions]
        encoded = [text.encode() for text in texts]
        lengths = torch.tensor([0] + [len(text) for text in encoded])
        blob = bytearray(b"".join(encoded))
        tensors = {
            **tensors,
            "caption_offsets": lengths.cumsum(0),
            "captions": torch.frombuffer(blob, dtype=torch.uint8) if blob else torch.empty(0, dtype=torch.uint8),
        }
    content = save(tensors)
    note = {"file": file.name, "rows": len(tensors["row"]), "bytes": len(content)}
    note["sha256"] = hashlib.sha256(content).hexdigest()
    if "mask" in tensors:
        labelled = tensors["mask"][tensors["mask"] != IGNORE_INDEX]
        note["mask_classes"] = int(labelled.max()) + 1 if labelled.numel() else 0
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)
    write_json(file.with_suffix(".json"), {"request": request, **note})


def complete_shard(file: Path, request: str, *, verify: bool) -> dict[str, Any] | None:
    """The note of a shard that was made for `request` and is whole, or None.

    Args:
        verify: read it through and compare its SHA-256, not only its size.
    """
    try:
        note = json.loads(file.with_suffix(".json").read_text())
        size = file.stat().st_size
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if note.pop("request") != request or size != note["bytes"]:
        return None
    if verify:
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != note["sha256"]:
                return None
    return note
