"""What precompute_latents.py has to encode, and how that differs from what a folder already contains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.core.files import read_json_object
from training.data.images import ImageDataset
from training.data.latent_cache.format import rows_of_shards


@dataclass
class SplitWork:
    """One split to encode."""

    name: str
    images: ImageDataset
    fingerprint: str
    request: str
    """Hash of everything that determines the bytes of a shard; a shard with another hash is encoded again."""

    def shards(self, shard_rows: int) -> list[Sequence[int]]:
        """Return the rows of each shard."""
        return rows_of_shards(len(self.images), self.images.batch_groups, shard_rows)


def differences_of(manifest: dict[str, Any], facts: dict[str, Any], works: Sequence[SplitWork]) -> list[str]:
    """Return what differs between a cache's manifest and the facts about the cache that is to be made."""
    differences: list[str] = []
    if manifest["vae"]["fingerprint"] != facts["vae"]["fingerprint"]:
        there, here = manifest["vae"], facts["vae"]
        differences.append(
            f"VAE {there['name']} ({there['fingerprint'][:12]}) there, {here['name']} ({here['fingerprint'][:12]}) here"
        )
    for name in {**manifest, **facts}:
        there, here = manifest.get(name), facts.get(name)
        if name not in ("vae", "splits") and there != here:
            differences.append(f"{name} differ" if name == "label_names" else f"{name} {there} there, {here} here")
    for work in works:
        there = manifest["splits"].get(work.name)
        if there and there["dataset"] != work.fingerprint:
            differences.append(
                f"dataset of split '{work.name}' {there['dataset'][:12]} there, {work.fingerprint[:12]} here"
            )
        elif there and there["request"] != work.request and not differences:
            differences.append(f"split '{work.name}' was made with another --on_bad_sample")
    return differences


def foreign_shards(folder: Path, works: Sequence[SplitWork]) -> list[str]:
    """Return what is wrong with the shards in a folder without manifest: at most one that was made for other data."""
    for work in works:
        for note in sorted((folder / work.name).glob("shard-*.json")):
            content = read_json_object(note)
            if content is not None and content.get("request") != work.request:  # a damaged note is made again
                return [f"{note.with_suffix('.safetensors')} was made with another VAE, dataset, transform or flags"]
    return []
