"""Latents computed once: posterior moments in memory-mapped shards, with captions, labels and masks beside them.

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
import os
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pipelines.tools.cli import UserError, nearest
from pipelines.tools.commands import command
from training.core.classes import RowClasses
from training.core.draws import SampleKey
from training.data.classes import column_classes
from training.data.fingerprints import dataset_fingerprint, vae_fingerprint
from training.data.images import (
    DataConfig,
    ImageDataset,
    LabelMap,
    collate_items,
    load_label_map,
    load_split,
    transform_fingerprint,
)
from training.data.tokenization import CaptionTokens
from training.data.transforms import flips, pick_caption
from training.objectives.segmentation import IGNORE_INDEX

# Masks and the label column's name came later, and are named only where they are not what they always were: caches
# without them are the same files as ever.
FORMAT_VERSION = 1
MANIFEST = "cache.json"
MAKER = command("data_scripts/precompute_latents.py")
# Several captions of one picture are kept in one field; no caption contains this.
_CAPTION_SEPARATOR = "\0"
_HASH_BLOCK_BYTES = 1 << 22


class LatentCache:
    """A complete cache, opened for reading: nothing but its manifest is loaded.

    Raises:
        UserError: not there, not finished, or shards that are missing or have another size.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            state = "has not been finished" if self.path.is_dir() and any(self.path.iterdir()) else "does not exist"
            raise UserError(f"the latent cache '{path}' {state}; make it, or go on making it, with {MAKER}")
        self.manifest = manifest
        if self.manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"the latent cache '{path}' has format {self.manifest['format_version']}, this version reads "
                f"{FORMAT_VERSION}; make it again: {MAKER} --overwrite true"
            )
        self._check_files()

    @property
    def splits(self) -> list[str]:
        return list(self.manifest["splits"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)"""
        channels, height, width = self.manifest["latent_shape"]
        return channels, height, width

    @property
    def resolution(self) -> int:
        """Side of the pictures that were encoded, in pixels."""
        return self.manifest["resolution"]

    @property
    def vae_name(self) -> str:
        """What `--vae` was when the cache was made."""
        return self.manifest["vae"]["name"]

    @property
    def has_captions(self) -> bool:
        return self.manifest["captions"]

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id; empty when no labels were cached."""
        return dict(enumerate(self.manifest["label_names"]))

    @property
    def label_column(self) -> str:
        """The column that the labels were read from."""
        return self.manifest.get("label_column", DataConfig().label_column)

    @property
    def mask_column(self) -> str | None:
        """The column that the masks were read from; None without masks."""
        return self.manifest.get("mask_column")

    def split(
        self,
        name: str,
        *,
        caption_tokens: CaptionTokens | None = None,
        random_flip: bool = False,
        num_mask_classes: int = 0,
        config: DataConfig | None = None,
    ) -> LatentCacheDataset:
        """One split as a map-style dataset.

        Args:
            caption_tokens: batches then have the token ids of their captions.
            num_mask_classes: items have masks of so many classes; 0 for no masks, though the cache may have some.
            config: may name the pictures that were encoded (see `check`); `classes` then knows all of their columns.

        Raises:
            UserError: no such split, flips wanted from a cache without mirrored latents, or masks that the cache has
                not, or that have more classes.
        """
        if name not in self.splits:
            raise UserError(
                f"the latent cache '{self.path}' has no split '{name}'{nearest(name, self.splits)}; "
                f"it has {', '.join(self.splits)}: make it with {MAKER} --splits '[{', '.join([*self.splits, name])}]'"
            )
        if random_flip and not self.manifest["flips"]:
            raise UserError(
                self._no_flips() + "; leave out --random_flip, or make it again with it and --overwrite true"
            )
        if num_mask_classes:
            self._check_masks(name, num_mask_classes, config)
        return LatentCacheDataset(
            self,
            name,
            caption_tokens=caption_tokens,
            random_flip=random_flip,
            masks=num_mask_classes > 0,
            config=config,
        )

    def require(self, *, captions: bool, labels: bool) -> None:
        """Raise UserError when the cache lacks what a run is conditioned on."""
        for wanted, there, name in ((captions, self.has_captions, "captions"), (labels, bool(self.id2label), "labels")):
            if wanted and not there:
                raise UserError(f"the latent cache {self.path} has no {name}; make it with {name}")

    def check(self, vae: torch.nn.Module, vae_name: str, config: DataConfig | None = None) -> None:
        """Refuse a cache that does not belong to this VAE, and, where `config` names a dataset, to these data.

        Raises:
            UserError: which of VAE, transform and dataset differs, both values, and the command that makes it anew.
        """
        differences = []
        fingerprint = vae_fingerprint(vae)
        if fingerprint != self.manifest["vae"]["fingerprint"]:
            differences.append(
                f"VAE: the cache is of {self.vae_name} ({self.manifest['vae']['fingerprint'][:12]}), "
                f"this run has {vae_name} ({fingerprint[:12]})"
            )
        if config is not None:
            transform = transform_fingerprint(config)
            if transform != self.manifest["transform"]:
                differences.append(f"transform: the cache has '{self.manifest['transform']}', this run '{transform}'")
            if config.random_flip and not self.manifest["flips"]:
                differences.append(f"transform: {self._no_flips()}, this run has random_flip")
            if config.dataset_name or config.train_data_dir:
                differences += self._dataset_differences(config)
        if differences:
            raise UserError(
                f"the latent cache '{self.path}' does not belong to this run: {'; '.join(differences)}. "
                f"Make it anew:\n  {self._rebuild_command(config or DataConfig(), vae_name)}"
            )

    def _dataset_differences(self, config: DataConfig) -> list[str]:
        differences = []
        label_map = load_label_map(config) if self.manifest["label_names"] else None
        config = replace(
            config, mask_column=self.mask_column or config.mask_column
        )  # whether this run wants them or not
        for name, split in self.manifest["splits"].items():
            data = open_images(
                config,
                name,
                self.manifest["seed"],
                captions=self.has_captions,
                label_map=label_map,
                masks=self.mask_column is not None,
            )
            fingerprint = dataset_fingerprint(data)
            if fingerprint != split["dataset"]:
                differences.append(
                    f"dataset: split '{name}' of the cache is {split['dataset'][:12]} ({split['rows']} rows), "
                    f"that of {config.dataset_name or config.train_data_dir} is {fingerprint[:12]} ({len(data)} rows)"
                )
        return differences

    def _rebuild_command(self, config: DataConfig, vae_name: str) -> str:
        """The command line that makes this cache anew for `config`, with the splits and storage it has."""
        words = [
            *shlex.split(MAKER),
            "--vae",
            vae_name,
            "--output_dir",
            str(self.path),
            "--overwrite",
            "true",
        ]
        given = {
            field.name: (getattr(config, field.name), getattr(DataConfig(), field.name)) for field in fields(DataConfig)
        }
        given["seed"] = (self.manifest["seed"], 0)
        given["storage_dtype"] = (self.manifest["storage_dtype"], "float32")
        for name, (value, default) in given.items():
            if value != default:
                words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
        return shlex.join(words)

    def _check_masks(self, split: str, num_classes: int, config: DataConfig | None) -> None:
        if config and self.mask_column not in (None, config.mask_column):
            raise UserError(
                f"the masks in the latent cache '{self.path}' are those of column '{self.mask_column}', and this run "
                f"wants '{config.mask_column}'; say --mask_column {self.mask_column}, or make the cache again"
            )
        if not self.mask_column:
            raise UserError(
                f"the latent cache '{self.path}' has no masks; make it again with --masks yes --overwrite true"
            )
        there = max(shard["mask_classes"] for shard in self.manifest["splits"][split]["shards"])
        if there > num_classes:
            raise UserError(
                f"class id {there - 1} of a mask in split '{split}' of the latent cache '{self.path}' is beyond the "
                f"{num_classes} classes (0 to {num_classes - 1}, and {IGNORE_INDEX} for unlabelled pixels)"
            )

    def _no_flips(self) -> str:
        return f"the latent cache '{self.path}' has no mirrored pictures"

    def _check_files(self) -> None:
        for name, split in self.manifest["splits"].items():
            for shard in split["shards"]:
                file = self.path / name / shard["file"]
                size = file.stat().st_size if file.is_file() else None
                if size != shard["bytes"]:
                    fact = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
                    raise UserError(
                        f"{file} {fact}; run {MAKER} with the cache's flags again, it makes what is damaged"
                    )


class LatentCacheDataset(torch.utils.data.Dataset):
    """Rows of a split as `{"mean", "logvar", "caption", "label", "mask", "index"}`: an `ImageDataset` with moments for
    pixels.

    `mean` and `logvar`: float32 C h w, raw VAE units; no `logvar` for a VAE without a posterior; `caption` and `label`
    where the cache has them; `mask`: int64 R R of class ids, if asked for. Flips and the choice among several captions
    are functions of `SampleKey.key`.
    """

    def __init__(
        self,
        cache: LatentCache,
        split: str,
        *,
        caption_tokens: CaptionTokens | None = None,
        random_flip: bool = False,
        masks: bool = False,
        config: DataConfig | None = None,
    ):
        self.name, self.masks, self.config = split, masks, config
        self.path, self.label_column, self.seed = cache.path, cache.label_column, cache.manifest["seed"]
        self.id2label = cache.id2label
        self.captions = cache.has_captions
        self.caption_tokens = caption_tokens
        self.random_flip = random_flip
        self._rows = cache.manifest["splits"][split]["rows"]
        self._shard_rows = cache.manifest["shard_rows"]
        self._files = [cache.path / split / shard["file"] for shard in cache.manifest["splits"][split]["shards"]]
        self._open: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        number, row = divmod(key.index, self._shard_rows)
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = read_shard(self._files[number])
        variant = int(self.random_flip and flips(key.key))
        # Copies: a view would drag its whole shard along when a loader worker passes it on.
        item: dict[str, Any] = {"mean": shard["mean"][row, variant].to(torch.float32, copy=True)}
        if "logvar" in shard:
            item["logvar"] = shard["logvar"][row, variant].to(torch.float32, copy=True)
        if "captions" in shard:
            start, stop = shard["caption_offsets"][row : row + 2].tolist()
            text = shard["captions"][start:stop].numpy().tobytes().decode()
            several = _CAPTION_SEPARATOR in text
            item["caption"] = pick_caption(text.split(_CAPTION_SEPARATOR), key.key) if several else text
        if "label" in shard:
            item["label"] = int(shard["label"][row])
        if self.masks:
            mask = shard["mask"][row].to(torch.int64)
            item["mask"] = mask.flip(-1) if variant else mask
        item["index"] = key.index
        return item

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[dict[str, Any]]:
        return [self[key] for key in keys]

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch, as of `ImageDataset`."""
        return collate_items(items, self.caption_tokens)

    def classes(self, column: str) -> RowClasses:
        """The class of each row, for `--balance_by`: by any column of the pictures where they are named, or the labels.

        Raises:
            UserError: neither has this column.
        """
        if self.config and (self.config.dataset_name or self.config.train_data_dir):
            return column_classes(load_split(self.config, self.name, self.seed), column)
        if column == self.label_column and self.id2label:
            ids = torch.cat([read_shard(file)["label"] for file in self._files])
            return _without_unnamed(ids, list(self.id2label.values()))
        cached = f"'{self.label_column}'" if self.id2label else "no classes"
        raise UserError(
            f"--balance_by {column}: the latent cache '{self.path}' holds {cached}; name the pictures it was made from "
            "as well (--dataset_name or --train_data_dir), or make it again with "
            f"--label_column {column} --labels yes --overwrite true"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # workers map the files themselves


def _without_unnamed(ids: Tensor, names: list[str]) -> RowClasses:
    """The classes there are, where names are no names but the numbers up to the largest one seen (`LabelMap.of`)."""
    if names != [str(i) for i in range(len(names))]:
        return RowClasses(ids, names)
    used, ids = ids.unique(return_inverse=True)
    return RowClasses(ids, [names[i] for i in used.tolist()])


def open_images(
    config: DataConfig, split: str, seed: int, *, captions: bool, label_map: LabelMap | None, masks: bool = False
) -> ImageDataset:
    """The pictures of a split as a cache holds them: unflipped, with every caption, and masks of any class."""
    return ImageDataset(
        load_split(config, split, seed),
        config,
        captions=captions,
        labels=label_map is not None,
        label_map=label_map,
        num_mask_classes=IGNORE_INDEX if masks else 0,
        augment=False,
        every_caption=True,
    )


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
    file.parent.mkdir(parents=True, exist_ok=True)
    content = save(tensors)
    temporary = file.with_suffix(".tmp")
    with open(temporary, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    note = {"file": file.name, "rows": len(tensors["row"]), "bytes": len(content)}
    note["sha256"] = hashlib.sha256(content).hexdigest()
    if "mask" in tensors:
        labelled = tensors["mask"][tensors["mask"] != IGNORE_INDEX]
        note["mask_classes"] = int(labelled.max()) + 1 if labelled.numel() else 0
    os.replace(temporary, file)
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
    return note if not verify or file_sha256(file) == note["sha256"] else None


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Atomically, and the same bytes for the same content."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as handle:
        json.dump(content, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
