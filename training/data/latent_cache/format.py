"""The files of a latent cache: memory-mapped shards of posterior moments, captions, labels and masks.

N rows, V variants (1, or 2 with the mirrored image), C latent channels, h w latent cells, H W pixels. `mean` and
`logvar` are in the VAE's raw units; each training step draws noise and scales latents according to the VAE's config.

    PATH/cache.json                            source of the cache, and the size and SHA-256 of every shard
    PATH/<split>/shard-00000.safetensors       mean, logvar N V C h w; label, row N; mask N H W (uint8, mirrored only
                                               when it is read); captions (UTF-8) and their offsets
    PATH/<split>/shard-00000.json              marks the shard of the same name as complete

With aspect buckets, all rows of a shard are of one size; cache.json has the sizes, and the bucket of each row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipelines.tools.commands import command
from training.core.files import WRITING, read_json_object, write_atomically, write_json
from training.core.made_folders import CACHE_MANIFEST
from training.data.errors import WorkerError
from training.objectives.segmentation import IGNORE_INDEX

# Masks and the name of the label column were added later. The manifest mentions them only if there are masks or if the
# name is not the default one, so that all other caches have the same bytes as before.
FORMAT_VERSION = 1
MANIFEST = CACHE_MANIFEST
MANIFEST_KEYS = {"format_version", "vae", "transform", "resolution", "latent_shape", "flips", "shard_rows", "splits"}
MAKER = command("data_scripts/precompute_latents.py")
REPAIR = f"run {MAKER} with the cache's flags again to repair it"
NOTE_KEYS = {"request", "file", "rows", "bytes", "sha256"}
# Separates several captions of one image, which are stored in one field; no caption contains it.
_CAPTION_SEPARATOR = "\0"


class DamagedShard(WorkerError):
    """A shard that cannot be read, or whose content is not what was written."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished cache; None if the cache is not finished, or the manifest is damaged."""
    manifest = read_json_object(folder / MANIFEST)
    return manifest if manifest is not None and manifest.keys() >= MANIFEST_KEYS else None


def rows_of_shards(rows: int, groups: Tensor | None, shard_rows: int) -> list[Sequence[int]]:
    """Return the rows in each shard, up to `shard_rows`: in their order, or in that of their groups (N) if there are
    some, with the rows of one group in a shard."""
    if groups is None:
        return [range(start, min(start + shard_rows, rows)) for start in range(0, rows, shard_rows)]
    own = [(groups == group).nonzero().flatten().tolist() for group in groups.unique().tolist()]
    return [group[start : start + shard_rows] for group in own for start in range(0, len(group), shard_rows)]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def read_shard(file: Path) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of a shard; pages are read when they are accessed.

    Raises:
        DamagedShard: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedShard(f"{file} cannot be read ({error}); {REPAIR}") from None


def require_intact(file: Path, sha256: str) -> None:
    """Raise DamagedShard unless the content of a shard has the SHA-256 that its cache's manifest has for it."""
    with file.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != sha256:
            raise DamagedShard(f"{file} is damaged (its SHA-256 is not that in {MANIFEST}); {REPAIR}")


def captions_of_rows(shard: dict[str, Tensor], rows: Tensor) -> list[str | list[str]]:
    """Return the caption of each of these rows of a shard, or the captions of a row that has several."""
    text = memoryview(shard["captions"].numpy())
    starts, stops = (shard["caption_offsets"][places].tolist() for places in (rows, rows + 1))
    captions = [str(text[start:stop], "utf-8") for start, stop in zip(starts, stops, strict=True)]
    return [caption.split(_CAPTION_SEPARATOR) if _CAPTION_SEPARATOR in caption else caption for caption in captions]


def write_shard(
    file: Path, tensors: dict[str, Tensor], captions: Sequence[str | list[str]] | None, request: str
) -> None:
    """Write a shard atomically, and then the note that marks it as complete."""
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
    """Return the note of a shard that was made for `request` and is complete, or None.

    Args:
        verify: read the whole shard and compare its SHA-256, not only its size.
    """
    note = read_json_object(file.with_suffix(".json"))
    if note is None or not file.is_file() or not note.keys() >= NOTE_KEYS:
        return None
    if note.pop("request") != request or file.stat().st_size != note["bytes"]:
        return None
    if verify:
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != note["sha256"]:
                return None
    return note


def remove_strays(folder: Path, files: set[str]) -> None:
    """Delete shards of an earlier, larger cache, and what killed processes of this and earlier versions left."""
    shards = [file for file in folder.glob("shard-*") if file.with_suffix(".safetensors").name not in files]
    unfinished = (*folder.glob(f"{WRITING}*"), *folder.parent.glob(f"{WRITING}*"))
    for file in (*shards, *unfinished, *folder.glob("shard-*.tmp"), *folder.glob(".shard-*.tmp*")):
        file.unlink(missing_ok=True)
