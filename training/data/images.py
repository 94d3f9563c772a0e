"""Training data: a split as a map-style dataset of tensors.

B batch, H W pixels of a sample. Rows are decoded when they are requested.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image

from pipelines.tools.cli import UserError
from pipelines.tools.commands import command
from training.core.classes import RowClasses
from training.core.draws import SampleKey
from training.data.aspect_buckets import AspectBuckets, InBuckets, image_sizes, kept_size
from training.data.caption_text import caption_problem, cleaned_caption
from training.data.classes import column_classes
from training.data.companions import Companion, ControlImage, SegmentationMask
from training.data.errors import WorkerError
from training.data.labels import LabelMap, label_problem, load_label_map
from training.data.pixel_cache import PixelCache
from training.data.shards.fetching import RemoteReading, prefetch
from training.data.shards.opening import row_blocks
from training.data.source import (
    DataConfig,
    load_all_splits,
    load_split,
    require_column,
    row_id,
    stored_rows_key,
    transform_fingerprint,
    undecoded_images,
)
from training.data.tokenization import CaptionTokens
from training.data.transforms import (
    CHANNELS,
    BadSample,
    BrokenImage,
    CropGeometry,
    apply_geometry,
    crop_geometry,
    decoded,
    load_mode,
    load_upright,
    padded_to_square,
    pick_caption,
    to_tensor,
    verify_image,
)

if TYPE_CHECKING:
    from datasets import Dataset

CHECK = command("data_scripts/check_dataset.py")
__all__ = [
    "BadSample",
    "DataConfig",
    "ImageDataset",
    "LabelMap",
    "collate_items",
    "decoded_rows",
    "load_all_splits",
    "load_label_map",
    "load_split",
    "row_id",
    "transform_fingerprint",
]

logger = logging.getLogger(__name__)


class BadRow(WorkerError):
    """A row that cannot be used and stops training, because `on_bad_sample` is "error"."""


class ImageDataset(InBuckets, torch.utils.data.Dataset):
    """Rows of a split as `{"pixel_values", "caption", "label", "mask", "conditioning_pixel_values", "index"}`.

    `pixel_values` is float32 C H W in [-1, 1], with the channels of `--image_mode`, and `index` is the row that was
    used. If requested, items also have
    `caption` (str), `label` (int), `mask` (int64 H W of class ids) and `conditioning_pixel_values` (float32 C H W in
    [0, 1]). Crop, flip and the choice among several captions are functions of `SampleKey.key` alone; masks and control
    images are cropped and flipped with their image. `collate` makes a batch of items and tokenizes their captions.

    Args:
        dataset: from `load_split`.
        captions, labels: whether items have them; their columns must then exist.
        caption_tokens: tokenizes the captions of a batch; None adds no token ids.
        num_mask_classes: number of classes of `mask_column`; 0 for no masks.
        control: source of `conditioning_pixel_values` (see `training.data.companions.control_of`).
        label_map: from `load_label_map`, shared by all splits; None reads the classes from `dataset`.
        augment: whether to crop and flip as configured; False uses the centre crop and no flip, as for validation.
        every_caption: whether an item has all captions of a row with several captions, instead of a random one.

    Raises:
        UserError: at construction, if a column is missing; `BadRow` when an unusable row is read and `on_bad_sample` is
            "error".
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        captions: bool = True,
        caption_tokens: CaptionTokens | None = None,
        labels: bool = False,
        num_mask_classes: int = 0,
        control: ControlImage | SegmentationMask | None = None,
        label_map: LabelMap | None = None,
        augment: bool = True,
        every_caption: bool = False,
    ):
        self.config = config
        self.captions = captions
        self.caption_tokens = caption_tokens
        self.every_caption = every_caption
        self.center_crop = config.center_crop or not augment
        self.random_flip = config.random_flip and augment
        self.crop_scale = config.crop_scale if augment else 1.0
        columns = [config.image_column]
        require_column(dataset, config.image_column, "image_column")
        if captions:
            require_column(dataset, config.caption_column, "caption_column")
            columns.append(config.caption_column)
        self.label_map = None
        if labels:
            self.label_map = label_map or LabelMap.of(dataset, config.label_column)
            require_column(dataset, config.label_column, "label_column")
            columns.append(config.label_column)
        self.quick_columns = columns[1:]
        self.companions: dict[str, Companion] = {}
        if num_mask_classes:
            self.companions["mask"] = SegmentationMask(config.mask_column, num_mask_classes)
        if control is not None:
            self.companions["conditioning_pixel_values"] = control
        if config.pad_to_square and self.companions:
            raise UserError(
                "--pad_to_square true pads images, but not their masks and control images; leave it out, so that all "
                "of them are cropped alike"
            )
        self.row_blocks = row_blocks(dataset, config.shuffle_buffer)
        self.dataset = self._undecoded(dataset, columns)
        blocks = self.row_blocks
        self.remote = RemoteReading.of(self.dataset, self.image_columns, blocks) if blocks is not None else None
        self._every_column = dataset
        self.sizes = ((config.resolution, config.resolution),)
        self._kept_scale = self.crop_scale
        # A crop at a random place needs the whole image, and companions are cropped with it.
        self._from_center = self.center_crop and not self.companions
        self._kept = self._new_cache()
        # One byte per row, shared with the loader workers, so that each bad row is logged once and never read again.
        self._bad = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def _undecoded(self, dataset: Dataset, columns: Sequence[str]) -> Dataset:
        """Select `columns` and all columns of images, which stay encoded: they are decoded here, not by `datasets`."""
        image_flags = {self.config.image_column: "image_column"}
        for companion in self.companions.values():
            image_flags |= dict(zip(companion.columns, companion.flags, strict=True))
        for column, flag in image_flags.items():
            require_column(dataset, column, flag)
        dataset = dataset.select_columns(list(dict.fromkeys([*columns, *image_flags])))
        for column, flag in image_flags.items():
            dataset = undecoded_images(dataset, column, flag, self.config)
        return dataset

    def put_in_buckets(self, buckets: AspectBuckets, poll: Callable[[], None] = lambda: None) -> None:
        """Give each sample the size of the bucket with the nearest aspect ratio; call it before any row is read."""
        self.take_buckets(buckets, self.image_sizes(poll) if len(buckets.sizes) > 1 else ())
        self._kept = self._new_cache()

    def image_sizes(self, poll: Callable[[], None] = lambda: None) -> list[tuple[int, int]]:
        """Return (width, height) of each row's upright image."""
        return image_sizes(self.dataset, self.config.image_column, self.stored_rows_key, poll)

    def _new_cache(self) -> PixelCache | None:
        most = max(math.prod(kept_size(size, self._kept_scale)) for size in self.sizes)
        channels = CHANNELS[self.config.image_mode]
        return PixelCache.of(len(self.dataset), most, channels) if self._from_center else None

    def without_augmentation(self) -> Self:
        """Return the same rows as a dataset that crops at the centre and does not flip; it shares decoded images."""
        plain = copy.copy(self)
        plain.center_crop, plain.random_flip, plain.crop_scale = True, False, 1.0
        plain._from_center = not self.companions
        return plain

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id; empty without labels."""
        return dict(enumerate(self.label_map.names)) if self.label_map else {}

    decodes_images = True
    map_columns: Sequence[str] = ()
    """Columns of other images that samples are made of; a subclass sets them."""
    number_columns: Sequence[str] = ()
    """Columns of other values that samples are made of; a subclass sets them."""

    @property
    def stored_rows_key(self) -> str | None:
        """Key for records about the rows (see `training.data.records`); None if they are not in files."""
        return stored_rows_key(self._every_column, self.config) if self.config.source else None

    def classes(self, column: str) -> RowClasses:
        """Return the class of each row by any column, for `--balance_by`. Raises UserError."""
        return column_classes(self._every_column, column)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[dict[str, Any]]:
        columns = self.dataset[[key.index for key in keys]]
        self._receive(columns, keys)
        rows = ({name: values[i] for name, values in columns.items()} for i in range(len(keys)))
        return [self._item_or_replacement(row, key) for row, key in zip(rows, keys)]

    def _receive(self, columns: dict[str, list], keys: Sequence[SampleKey]) -> None:
        """Receive the images of a batch at the same time, if they are in remote shards and not cached."""
        if self.remote is None or self.row_blocks is None:
            return
        cached = self._kept if self._from_center else None
        missing = [i for i, key in enumerate(keys) if cached is None or key.index not in cached]
        sources = (columns[name][i] for name in self.image_columns for i in missing)
        prefetch(sources, whole_blocks=self.remote.fits(self.row_blocks.window))

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch: pixel_values B C H W, label and index int64 B, caption a list of B, input_ids int64 B L."""
        return collate_items(items, self.caption_tokens)

    def item(self, row: dict[str, Any], key: SampleKey) -> dict[str, Any]:
        """Return the training sample of a stored row.

        Raises:
            BadSample: the row cannot be used.
        """
        item: dict[str, Any] = {}
        if self.captions:
            captions = self.caption_of(row)
            item["caption"] = captions if self.every_caption else pick_caption(captions, key.key)
        if self.label_map is not None:
            item["label"] = self.label_of(row)
        item |= self._images(row, key)
        item["index"] = key.index
        return item

    def _images(self, row: dict[str, Any], key: SampleKey) -> dict[str, torch.Tensor]:
        """Return the row's image, mask and control image, all cropped at the same place to H × W pixels."""
        mode, size = self.config.image_interpolation_mode, self.size_of(key.index)
        if self._from_center:
            center = self._center(row, key.index)
            return {"pixel_values": to_tensor(apply_geometry(center, self._crop(center, key, size), size, mode))}
        image = self._decoded(row)
        place = self._crop(image, key, size)
        tensors = {"pixel_values": to_tensor(apply_geometry(image, place, size, mode))}
        for name, companion in self.companions.items():
            stored = companion.load(row, image.size)
            cut = [apply_geometry(one, place, size, companion.resampling or mode) for one in stored]
            tensors[name] = companion.tensor(cut)
        return tensors

    def _decoded(self, row: dict[str, Any]) -> Image.Image:
        image = decoded(row, self.config.image_column, load_mode(self.config.image_mode))
        return padded_to_square(image) if self.config.pad_to_square else image

    def _crop(self, image: Image.Image, key: SampleKey, shape: tuple[int, int] = (1, 1)) -> CropGeometry:
        how: dict[str, Any] = {
            "center_crop": self.center_crop,
            "random_flip": self.random_flip,
            "crop_scale": self.crop_scale,
        }
        return crop_geometry(image.size, key=key.key, shape=shape, **how)

    def _center(self, row: dict[str, Any], index: int) -> Image.Image:
        """Return the row's largest central crop, reduced if it is large; decoded only if it is not cached."""
        pixels = self._kept.get(index) if self._kept is not None else None
        if pixels is not None:
            return Image.fromarray(pixels)
        image, size = self._decoded(row), self.size_of(index)
        place = crop_geometry(image.size, center_crop=True, random_flip=False, key=0, shape=size)
        kept = kept_size(size, self._kept_scale, (place.height, place.width))
        center = apply_geometry(image, place, kept, self.config.image_interpolation_mode)
        if self._kept is not None:
            self._kept.put(index, np.array(center))
        return center

    def caption_of(self, row: dict[str, Any]) -> str | list[str]:
        """Return the row's caption, or its captions if it has several, without control characters.

        Raises:
            BadSample: a caption is empty, too long or not a text.
        """
        captions = row[self.config.caption_column]
        problem = caption_problem(captions)
        if problem:
            raise BadSample(self.config.caption_column, problem)
        return [cleaned_caption(text) for text in captions] if isinstance(captions, list) else cleaned_caption(captions)

    def label_of(self, row: dict[str, Any]) -> int:
        """Return the row's class id.

        Raises:
            BadSample: the label is not a known class.
        """
        value = row[self.config.label_column]
        label = self.label_map.id_of(value) if self.label_map else None
        if label is None:
            names = self.label_map.names if self.label_map else ()
            raise BadSample(self.config.label_column, label_problem(value, names))
        return label

    def quick_problems(self, row: dict[str, Any]) -> list[BadSample]:
        """Return what is wrong in the `quick_columns` of a row, which are checked without decoding images."""
        problems = []
        for requested, read in ((self.captions, self.caption_of), (self.label_map is not None, self.label_of)):
            try:
                if requested:
                    read(row)
            except BadSample as problem:
                problems.append(problem)
        return problems

    def image_problems(self, row: dict[str, Any]) -> list[BadSample]:
        """Return what is wrong with a row's image, mask and control images, all of which are decoded."""
        try:
            size = verify_image(row[self.config.image_column])
        except BrokenImage as error:
            return [BadSample(self.config.image_column, str(error))]
        problems = []
        for companion in self.companions.values():
            try:
                companion.load(row, size)
            except BadSample as problem:
                problems.append(problem)
        return problems

    @property
    def image_columns(self) -> list[str]:
        """The columns that `image_problems` checks."""
        return [self.config.image_column, *(name for c in self.companions.values() for name in c.columns)]

    def where(self, index: int) -> str:
        """Describe the row for messages: its number in the stored split, and its file if it has one."""
        source = self.dataset[index][self.config.image_column]
        path = source.get("path") if isinstance(source, dict) else None
        return f"row {row_id(self.dataset, index)}" + (f" ({path})" if path else "")

    def _item_or_replacement(self, row: dict[str, Any], key: SampleKey) -> dict[str, Any]:
        """Return the row's item, or with `on_bad_sample skip` that of the next good row (of the same size)."""
        index = key.index
        for _ in range(len(self)):
            if not self._bad[index]:
                try:
                    return self.item(row, SampleKey(index, key.key))
                except BadSample as bad:
                    self._report(index, bad)
            index = self.next_index(index)
            row = self.dataset[index]
        raise UserError(f"none of the {len(self)} rows can be used; {CHECK} lists what is wrong with them")

    def _report(self, index: int, bad: BadSample) -> None:
        message = f"{self.where(index)}, column '{bad.column}': {bad}"
        if self.config.on_bad_sample == "error":
            raise BadRow(
                f"{message}; fix or remove it ({CHECK} lists all such rows), or skip it with --on_bad_sample skip"
            ) from bad
        self._bad[index] = 1
        logger.warning("%s; the next good row is used instead (%d bad rows so far)", message, int(self._bad.sum()))


def decoded_rows(dataset: Dataset, config: DataConfig, at_most: int) -> list[dict[str, Any]]:
    """Return the first rows of a dataset as dicts, with all of their images decoded.

    Raises:
        UserError: an image is missing or damaged.
    """
    import datasets

    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    for name in images:
        dataset = undecoded_images(dataset, name, "dataset_name", config)
    rows = [dataset[i] for i in range(min(at_most, len(dataset)))]
    for number, row in enumerate(rows):
        for name in images:
            try:
                row[name] = decoded(row, name, load_upright)
            except BadSample as bad:
                raise UserError(f"row {number} of {config.source}, column '{name}': {bad}; fix or remove it") from None
    return rows


def collate_items(items: Sequence[dict[str, Any]], caption_tokens: CaptionTokens | None = None) -> dict[str, Any]:
    """Stack tensors, convert integers to int64 tensors, keep everything else as lists, and tokenize the captions."""
    batch: dict[str, Any] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, torch.Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = torch.tensor(values) if isinstance(first, int) else values
    return batch if caption_tokens is None else {**batch, **caption_tokens(batch["caption"])}
