"""A complete latent cache, opened for reading, and its splits as map-style datasets.

C latent channels, h w latent cells, H W pixels (see format.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.tools.cli import UserError, located, nearest
from pipelines.tools.private import expand_home
from training.core.blocks import RowBlocks
from training.core.classes import RowClasses
from training.core.draws import SampleKey
from training.core.made_folders import cache_problem
from training.data.aspect_buckets import InBuckets
from training.data.classes import column_classes
from training.data.images import DataConfig, collate_items, load_split
from training.data.latent_cache.format import (
    FORMAT_VERSION,
    MAKER,
    REPAIR,
    captions_of_rows,
    read_manifest,
    read_shard,
    require_intact,
    rows_of_shards,
)
from training.data.tokenization import CaptionTokens
from training.data.transforms import flips, pick_caption
from training.objectives.segmentation import IGNORE_INDEX

# Linux allows a process about 65,000 mappings, and a mapping has a cost even if no page of it is in memory.
MOST_OPEN_SHARDS = 8192


class LatentCache:
    """A complete cache, opened for reading; only its manifest is loaded.

    Raises:
        UserError: the cache does not exist or is not complete, or shards are missing or have another size.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            state = cache_problem(self.path) if self.path.is_dir() and any(self.path.iterdir()) else "does not exist"
            state = state or "is damaged"
            raise UserError(f"the latent cache {located(path)} {state}; make or complete it with {MAKER}")
        self.manifest = manifest
        if self.manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"the latent cache '{path}' has format {self.manifest['format_version']}, but this version "
                f"reads format {FORMAT_VERSION}; make it again with {MAKER} --overwrite true"
            )
        problem = cache_problem(self.path)
        if problem:
            raise UserError(f"the latent cache '{path}' {problem}; {REPAIR}")

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
        """Width and height of the encoded images in pixels."""
        return self.manifest["resolution"]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Sizes (height, width) of the encoded images in pixels, that of most images first."""
        if "aspect_buckets" not in self.manifest:
            return ((self.resolution, self.resolution),)
        return tuple((height, width) for height, width in self.manifest["aspect_buckets"]["sizes"])

    def require_sides(self, divisor: int, least: int) -> None:
        """Raise UserError unless the sides in pixels are multiples of `divisor` and at least `least`."""
        for size in self.sizes if "aspect_buckets" in self.manifest else ():
            if min(size) < least or size[0] % divisor or size[1] % divisor:
                raise UserError(
                    f"the latent cache '{self.path}' has images of {size[0]}×{size[1]} pixels, but this network needs "
                    f"sides that are multiples of {divisor} and at least {least}; make it again with --bucket_divisor "
                    f"{divisor} --overwrite true"
                )

    @property
    def vae_name(self) -> str:
        """The value of `--vae` when the cache was made."""
        return expand_home(self.manifest["vae"]["name"])

    @property
    def has_flips(self) -> bool:
        """Whether the cache has latents of mirrored images."""
        return self.manifest["flips"]

    @property
    def has_captions(self) -> bool:
        return self.manifest["captions"]

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id; empty if no labels were cached."""
        return dict(enumerate(self.manifest["label_names"]))

    @property
    def label_column(self) -> str:
        """The column that the labels were read from."""
        return self.manifest.get("label_column", DataConfig().label_column)

    @property
    def mask_column(self) -> str | None:
        """The column that the masks were read from; None if no masks were cached."""
        return self.manifest.get("mask_column")

    @property
    def fingerprint(self) -> str:
        """Hash of the content of all shards, the same wherever the cache is stored."""
        splits = self.manifest["splits"]
        content = [[name, [shard["sha256"] for shard in splits[name]["shards"]]] for name in sorted(splits)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def split(
        self,
        name: str,
        *,
        caption_tokens: CaptionTokens | None = None,
        random_flip: bool = False,
        num_mask_classes: int = 0,
        config: DataConfig | None = None,
    ) -> LatentCacheDataset:
        """Return one split as a map-style dataset.

        Args:
            caption_tokens: tokenizes the captions of a batch; None adds no token ids.
            random_flip: use the latents of mirrored images for half of the samples.
            num_mask_classes: number of classes of the masks; 0 leaves masks out even if the cache has some.
            config: may name the dataset that was encoded (see `check_cache`), so that `classes` can read all columns.

        Raises:
            UserError: the split does not exist, the cache lacks mirrored latents or masks that are requested, or its
                masks have more classes.
        """
        if name not in self.splits:
            raise UserError(
                f"the latent cache '{self.path}' has no split '{name}'{nearest(name, self.splits)}; "
                f"it has {', '.join(self.splits)}: make it with {MAKER} --splits '[{', '.join([*self.splits, name])}]'"
            )
        if random_flip and not self.has_flips:
            raise UserError(
                f"the latent cache '{self.path}' has no mirrored images; leave out --random_flip, or make it again "
                "with it and --overwrite true"
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
        """Raise UserError if the cache lacks captions or labels that a run is conditioned on."""
        for used, there, name in ((captions, self.has_captions, "captions"), (labels, bool(self.id2label), "labels")):
            if used and not there:
                raise UserError(f"the latent cache {self.path} has no {name}; make it with {name}")

    def _check_masks(self, split: str, num_classes: int, config: DataConfig | None) -> None:
        if config and self.mask_column not in (None, config.mask_column):
            raise UserError(
                f"the masks in the latent cache '{self.path}' are those of column '{self.mask_column}', but this run "
                f"uses '{config.mask_column}'; set --mask_column {self.mask_column}, or make the cache again"
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


class Share(NamedTuple):
    """The part of a batch that is in one shard: the places in the batch, the rows of the shard, and their variants."""

    shard: dict[str, Tensor]
    places: Tensor
    rows: Tensor
    variants: Tensor


class Samples(Sequence[dict[str, Any]]):
    """Samples that were read together. They are views of the columns, which `LatentCacheDataset.collate` needs whole.

    Args:
        columns: a tensor or a list of B values for each name, as in a batch.
    """

    def __init__(self, columns: dict[str, Any]):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["index"])

    def __getitem__(self, place: Any) -> Any:
        values = {name: column[place] for name, column in self.columns.items()}
        return {
            name: int(value) if isinstance(value, Tensor) and value.ndim == 0 else value
            for name, value in values.items()
        }


class LatentCacheDataset(InBuckets, torch.utils.data.Dataset):
    """Rows of a split as `{"mean", "logvar", "caption", "label", "mask", "index"}`: like `ImageDataset`, with the VAE's
    posterior moments instead of pixels.

    `mean` and `logvar` are float32 C h w in raw VAE units; `logvar` is absent for a VAE without a posterior. `caption`
    and `label` are present if the cache has them, and `mask` (int64 H W of class ids) if requested. Flips and the
    choice among several captions are functions of `SampleKey.key`.
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
        self.sizes = cache.sizes
        self.name, self.masks, self.config = split, masks, config
        self.path, self.label_column, self.seed = cache.path, cache.label_column, cache.manifest["seed"]
        self.id2label = cache.id2label
        self.captions = cache.has_captions
        self.caption_tokens = caption_tokens
        self.random_flip = random_flip
        self._rows = cache.manifest["splits"][split]["rows"]
        self._shard_rows = cache.manifest["shard_rows"]
        groups = cache.manifest["splits"][split].get("buckets")
        # As in `ImageDataset`, a batch is of rows of one group, unless all rows have one size.
        self.batch_groups = torch.tensor(groups) if groups is not None and len(self.sizes) > 1 else None
        starts = torch.tensor([*range(0, self._rows, self._shard_rows), self._rows])
        streamed = config is not None and config.streaming and self.batch_groups is None
        self.row_blocks = RowBlocks(starts, config.shuffle_buffer) if config and streamed else None
        self._shards_and_places = None if self.batch_groups is None else self._placed(self.batch_groups)
        self._files = [cache.path / split / shard["file"] for shard in cache.manifest["splits"][split]["shards"]]
        self.source_fingerprint: str = cache.manifest["splits"][split]["dataset"]
        self._sha256 = [shard["sha256"] for shard in cache.manifest["splits"][split]["shards"]]
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        # One byte per shard, shared with the loader workers: each shard is verified once per session, when it is first
        # read. To verify the whole cache before the first step would delay it by minutes.
        self._intact = torch.zeros(len(self._files), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> Samples:
        variants = torch.tensor([int(self.random_flip and flips(key.key)) for key in keys])
        index = torch.tensor([key.index for key in keys])
        if self._shards_and_places is None:
            numbers, rows = index // self._shard_rows, index % self._shard_rows
        else:
            numbers, rows = self._shards_and_places[:, index]
        places = [(number, (numbers == number).nonzero().flatten()) for number in numbers.unique().tolist()]
        shares = [Share(self._shard(number), there, rows[there], variants[there]) for number, there in places]
        columns: dict[str, Any] = {}
        for name in ("mean", "logvar"):
            if name in shares[0].shard:
                columns[name] = _column(shares, functools.partial(_moments, name))
        if "captions" in shares[0].shard:
            columns["caption"] = _captions(shares, keys)
        if "label" in shares[0].shard:
            columns["label"] = _column(shares, lambda share: share.shard["label"][share.rows].long())
        if self.masks:
            columns["mask"] = _column(shares, _masks)
        return Samples({**columns, "index": index})

    def _placed(self, groups: Tensor) -> Tensor:
        """Return the shard of each row, and its place there. 2 N, int64."""
        placed = torch.empty(2, len(groups), dtype=torch.int64)
        for number, rows in enumerate(rows_of_shards(len(groups), groups, self._shard_rows)):
            places = torch.as_tensor(rows)
            placed[0, places], placed[1, places] = number, torch.arange(len(places))
        return placed

    def _shard(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of a shard. Raises DamagedShard if its content is not what was written."""
        if number not in self._open:
            if not self._intact[number]:
                require_intact(self._files[number], self._sha256[number])
                self._intact[number] = 1
            if len(self._open) >= MOST_OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[number] = read_shard(self._files[number])
        self._open.move_to_end(number)
        return self._open[number]

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch, as in `ImageDataset`."""
        batch = dict(items.columns) if isinstance(items, Samples) else collate_items(items)
        return batch if self.caption_tokens is None else {**batch, **self.caption_tokens(batch["caption"])}

    def classes(self, column: str) -> RowClasses:
        """Return the class of each row, for `--balance_by`: by any column of the dataset if the config names it,
        otherwise only by the cached labels.

        Raises:
            UserError: the column does not exist in either.
        """
        if self.config and (self.config.dataset_name or self.config.train_data_dir):
            return column_classes(load_split(self.config, self.name, self.seed), column)
        if column == self.label_column and self.id2label:
            ids = torch.cat([self._shard(number)["label"] for number in range(len(self._files))])
            return _without_unnamed(ids, list(self.id2label.values()))
        cached = f"'{self.label_column}'" if self.id2label else "no classes"
        raise UserError(
            f"--balance_by {column}: the latent cache '{self.path}' holds {cached}; name the dataset it was made "
            "from as well (--dataset_name or --train_data_dir), or make it again with "
            f"--label_column {column} --labels yes --overwrite true"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # each worker maps the files itself


def _column(shares: Sequence[Share], read: Callable[[Share], Tensor]) -> Tensor:
    """Return the values that `read` gives for the rows of each shard, in the order of the batch."""
    parts = [read(share) for share in shares]
    if len(parts) == 1:
        return parts[0]
    values = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for part, share in zip(parts, shares, strict=True):
        values.index_copy_(0, share.places, part)
    return values


def _moments(name: str, share: Share) -> Tensor:
    """Return means or log-variances, B C h w, as copies: a loader worker that returns a view sends its whole shard."""
    moments = share.shard[name]
    return moments.flatten(0, 1).index_select(0, share.rows * moments.shape[1] + share.variants).float()


def _masks(share: Share) -> Tensor:
    masks = share.shard["mask"][share.rows].long()
    return torch.where(share.variants.bool()[:, None, None], masks.flip(-1), masks)


def _captions(shares: Sequence[Share], keys: Sequence[SampleKey]) -> list[str]:
    captions = [""] * len(keys)
    for share in shares:
        for place, caption in zip(share.places.tolist(), captions_of_rows(share.shard, share.rows), strict=True):
            captions[place] = pick_caption(caption, keys[place].key)
    return captions


def _without_unnamed(ids: Tensor, names: list[str]) -> RowClasses:
    """Return the classes that occur.

    `LabelMap.of` names the classes of a column of numbers "0" to the largest number, whether or not they occur.
    """
    if names != [str(i) for i in range(len(names))]:
        return RowClasses(ids, names)
    used, ids = ids.unique(return_inverse=True)
    return RowClasses(ids, [names[i] for i in used.tolist()])
