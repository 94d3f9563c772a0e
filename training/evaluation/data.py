"""The real images that a model is measured against: those of its run, or of any other dataset."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pipelines.common.latents import image_channels_of
from pipelines.tools.cli import UserError
from pipelines.tools.files import read_text
from pipelines.tools.private import expand_home
from training.core.draws import SampleKey
from training.core.exchange import ALONE, Exchange
from training.core.files import write_atomically
from training.core.options import Options, option
from training.data.aspect_buckets import AspectBuckets
from training.data.briefs import BriefedPosters
from training.data.captions import CaptionDataConfig, CaptionedImages, captions_of
from training.data.companions import control_of
from training.data.fingerprints import dataset_fingerprint, evenly_spaced
from training.data.images import (
    DataConfig,
    ImageDataset,
    decoded_rows,
    load_all_splits,
    load_label_map,
    load_split,
    transform_fingerprint,
)
from training.data.records import cache_file
from training.data.transforms import CHANNELS
from training.metrics.features import CHUNK, FeatureExtractor
from training.metrics.generators import ImageGenerator, native_size
from training.metrics.images import to_pil

BATCH = 64


@dataclass
class EvaluationDataConfig(Options):
    """The real images. What is unset is read from the config.yaml of the model's run."""

    dataset_name: str | None = option(None)
    """Data to compare with: a Hub id, or a local folder or file; if unset, the data of the run"""
    dataset_config_name: str | None = option(None)
    """Configuration of the dataset, if it has several"""
    dataset_revision: str | None = option(None)
    """Commit, branch or tag of a Hub dataset; if unset, that of the run for its own data, and the newest commit of
    another dataset"""
    split: str = option("validation")
    """Split whose captions, labels, briefs or control images are given to the model; validation is what the run held
    out"""
    image_column: str | None = option(None)
    """Column with the images"""
    caption_column: str | None = option(None)
    """Column with the captions"""
    label_column: str | None = option(None)
    """Column with the class labels"""
    conditioning_image_column: list[str] | str | None = option(None)
    """Column with control images, or a list of such columns"""
    resolution: int | None = option(None, at_least=8)
    """Width and height of the real images in pixels; if unset, that of the model"""
    max_real_images: int = option(2000, at_least=8)
    """Maximum number of real images of each split, evenly spaced, whose distance from generated ones is measured"""
    max_training_images: int = option(100_000, at_least=2)
    """Maximum number of training images, evenly spaced, among which copies are searched for"""


class NamesData(Protocol):
    """Settings that may name another dataset than that of the model's run."""

    dataset_name: str | None
    dataset_revision: str | None


class RealImages:
    """The images of some rows, as they are trained on: cropped to a square or another rectangle, and resized.

    Args:
        name: what results call these images.
        data: opened rows.
        at_most: number of images to use, evenly spaced over the rows.
    """

    def __init__(self, name: str, data: ImageDataset, at_most: int):
        self.name, self.data = name, data
        self.rows = evenly_spaced(len(data), at_most)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, places: Sequence[int]) -> RealImages:
        """Return the images at these places of `rows` alone."""
        chosen = RealImages(self.name, self.data, len(places))
        chosen.rows = [self.rows[place] for place in places]
        return chosen

    def spread(self, at_most: int) -> list[int]:
        """Return up to `at_most` places of `rows`, evenly spaced."""
        return list(evenly_spaced(len(self), at_most))

    def batches(self, poll: Callable[[], None] = lambda: None) -> Iterator[list[Image.Image]]:
        """Yield all images, some at a time; `poll` is called before each batch and may raise to stop."""
        for start in range(0, len(self), BATCH):
            poll()
            yield self.images(range(start, min(start + BATCH, len(self))))

    def images(self, places: Sequence[int]) -> list[Image.Image]:
        """Return the images at these places of `rows`."""
        items = self.data.__getitems__([SampleKey(self.rows[place], 0) for place in places])
        return [to_pil(item["pixel_values"]) for item in items]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the images, the rows that are used, and how the images are cropped and resized."""
        content = [dataset_fingerprint(self.data), transform_fingerprint(self.data.config), str(self.rows)]
        if self.data.config.aspect_buckets:
            content.append(str(self.data.sizes))
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    def features(
        self, extractor: FeatureExtractor, exchange: Exchange, poll: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Return the features of all images: n D, float32. They are stored in the cache folder of `datasets`."""
        file = cache_file("features", [self.fingerprint, extractor.fingerprint], ".safetensors")
        known = None
        if exchange.is_main:
            with contextlib.suppress(OSError, SafetensorError, KeyError):
                known = load_file(file)["features"]
        known = exchange.gather(known)[0]
        if known is not None and len(known) == len(self):
            return known

        def some(places: Sequence[int]) -> Tensor:
            poll()
            return extractor(self.images(places))

        features = torch.cat(exchange.map_batches(some, len(self), CHUNK))
        if exchange.is_main:
            with contextlib.suppress(OSError):  # the next evaluation computes them again
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, save({"features": features.contiguous()}))
        return features


class EvaluationData:
    """The rows whose conditions a model gets, and all real images of the same data.

    Args:
        conditions: rows with what the generator needs of them.
        stored: the same rows as they are stored.
        splits: real images by split, of which generated ones are compared with up to `max_real_images`.
        training: all images that the model was trained on, up to `max_training_images`; None if there are none.
        trained: the rows of these images with what the generator needs of them.
        held_out: real images that were not trained on; None if there are none.
    """

    def __init__(
        self,
        conditions: ImageDataset,
        stored: Any,
        splits: Mapping[str, RealImages],
        training: RealImages | None = None,
        trained: ImageDataset | None = None,
        held_out: RealImages | None = None,
    ):
        self.conditions, self.splits, self.training, self.held_out = conditions, splits, training, held_out
        self._stored, self._trained = stored, trained

    def items(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows for these generated images; with more images than rows, the rows are used again."""
        return conditions_of(self.conditions, numbers)

    def training_items(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of the training images at these places of `training.rows`."""
        assert self.training is not None
        assert self._trained is not None
        return conditions_of(self._trained, [self.training.rows[place] for place in places])

    def training_captions(self) -> set[str]:
        """Return all captions of the training split."""
        assert self._trained is not None
        return set(captions_of(self._trained.dataset, self._trained.config.caption_column))

    @property
    def source(self) -> str:
        """The Hub id, folder or file of the data."""
        return self.conditions.config.source

    @property
    def has_briefs(self) -> bool:
        """Whether the rows are posters with the columns of a design brief."""
        return {"palette", "background", "title_position", "pictures"} <= set(self._stored.column_names)

    def stored_rows(self, count: int) -> list[dict[str, Any]]:
        """Return the stored row of each of `count` generated images, with its image decoded.

        Raises:
            UserError: an image is missing or damaged.
        """
        rows = decoded_rows(self._stored, self.conditions.config, count)
        return [rows[number % len(rows)] for number in range(count)]


def conditions_of(data: Any, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows that images with these numbers are generated for; with more images, rows are used again.

    Args:
        data: the dataset of a stage. Its items get `label_name` and `brief` if it has labels or design briefs.
    """
    rows = [number % len(data) for number in numbers]
    items = list(data.__getitems__([SampleKey(row, number) for row, number in zip(rows, numbers)]))
    for item, row in zip(items, rows):
        if "label" in item:
            item["label_name"] = data.id2label.get(int(item["label"]))
        if hasattr(data, "brief"):
            item["brief"] = data.brief(row)
    return items


def plain_images(rows: Any, config: DataConfig, buckets: AspectBuckets | None = None) -> ImageDataset:
    """Open rows for their images alone, cropped or stretched as in training, but always in the same way.

    Args:
        buckets: sizes of the images; None for squares.
    """
    kind = CaptionedImages if isinstance(config, CaptionDataConfig) else ImageDataset
    return _sized(kind(rows, config, captions=False, augment=False), buckets)


def _sized(data: ImageDataset, buckets: AspectBuckets | None) -> ImageDataset:
    if buckets is not None:
        data.put_in_buckets(buckets)
    return data


def folder_of_run(model: str) -> Path | None:
    """Return the folder of the run that a path belongs to; None for a model outside of a run."""
    path = Path(model).expanduser()
    folders = [path, *path.parents[:4]] if model and path.exists() else []
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def run_settings(model: str) -> dict[str, Any]:
    """Return the settings of the run that a path belongs to; empty if it is not in a run."""
    folder = folder_of_run(model)
    settings = yaml.safe_load(read_text(folder / "config.yaml")) if folder else None
    return expand_home(settings) if isinstance(settings, dict) else {}


def data_settings(config: NamesData, settings: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return those settings of a run's data that are in `known`, with the dataset that the command names instead, which
    has revisions of its own.

    Args:
        settings: settings of the model's run, empty without one.
    """
    chosen = {name: settings[name] for name in known if name in settings}
    if config.dataset_name and config.dataset_name != chosen.get("dataset_name"):
        chosen |= {"dataset_name": config.dataset_name, "train_data_dir": None, "dataset_revision": "auto"}
    return chosen | ({"dataset_revision": config.dataset_revision} if config.dataset_revision else {})


def open_evaluation_data(
    config: EvaluationDataConfig,
    settings: Mapping[str, Any],
    generator: ImageGenerator | None,
    exchange: Exchange = ALONE,
) -> EvaluationData:
    """Open the data for a model, or for images of unknown origin. Every process calls it.

    Args:
        settings: settings of the model's run, empty without one.

    Raises:
        UserError: the data do not exist, or lack what the model needs.
    """
    data = _data_config(config, settings, generator)
    data = dataclasses.replace(data, **exchange.on_main(data.pinned))
    buckets = _one_size(config, data, generator)
    seed = int(settings.get("seed") or 0)
    opened = load_split(data, config.split, seed)
    if not len(opened):
        raise UserError(f"no images of {data.source} are held out; give another --split, for example train")
    splits = {config.split: RealImages(config.split, plain_images(opened, data, buckets), config.max_real_images)}
    training = conditions = None
    if config.split == "train" or data.train_split in load_all_splits(data):
        rows = load_split(data, "train", seed)
        trained, conditions = plain_images(rows, data, buckets), _conditions(rows, data, generator, buckets)
        splits = {"train": RealImages("train", trained, config.max_real_images), **splits}
        training = RealImages("train", trained, config.max_training_images)
    held_out = (
        splits[config.split] if config.split != "train" else _held_out(data, seed, config.max_real_images, buckets)
    )
    given = _conditions(opened, data, generator, buckets)
    return EvaluationData(given, opened, splits, training, conditions, held_out)


def _one_size(config: EvaluationDataConfig, data: DataConfig, generator: ImageGenerator | None) -> AspectBuckets | None:
    """Return the default size of a model that was trained in aspect buckets: it is evaluated in this size alone, and
    real images are cropped to it."""
    size = native_size(generator.pipeline) if generator is not None and data.aspect_buckets else None
    return AspectBuckets((size,)) if size is not None and config.resolution is None else None


def _held_out(data: DataConfig, seed: int, at_most: int, buckets: AspectBuckets | None) -> RealImages | None:
    """Return the validation images, or None if the data have none."""
    try:
        rows = load_split(data, "validation", seed)
    except UserError:  # a run on other data held images out under another name
        return None
    return RealImages("validation", plain_images(rows, data, buckets), at_most) if len(rows) else None


def _conditions(
    rows: Any, data: DataConfig, generator: ImageGenerator | None, buckets: AspectBuckets | None
) -> ImageDataset:
    if generator is None:
        return plain_images(rows, data)
    if generator.takes_briefs:
        return BriefedPosters(rows, data, augment=False)
    control = None
    if generator.takes_controls:
        control = control_of(data.conditioning_image_column, *_control_kind(generator))
    kind = CaptionedImages if isinstance(data, CaptionDataConfig) else ImageDataset
    opened = kind(
        rows,
        data,
        captions=generator.takes_captions,
        labels=generator.takes_labels,
        label_map=load_label_map(data) if generator.takes_labels else None,
        control=control,
        augment=False,
    )
    return _sized(opened, buckets)


def _data_config(
    config: EvaluationDataConfig, settings: Mapping[str, Any], generator: ImageGenerator | None
) -> DataConfig:
    stretches = generator is not None and "image_fit" in generator.pipeline.config
    kind = CaptionDataConfig if stretches else DataConfig
    known = {field.name for field in dataclasses.fields(kind)}
    chosen = data_settings(config, settings, known)
    given = {name: getattr(config, name, None) for name in known if name != "dataset_name"}
    chosen |= {name: value for name, value in given.items() if value is not None}
    size = native_size(generator.pipeline) if generator is not None else None
    if config.resolution is None and size is not None:
        chosen["resolution"] = size[0]
    if generator is not None and generator.takes_images:
        modes = {channels: mode for mode, channels in CHANNELS.items()}
        chosen["image_mode"] = modes[image_channels_of(generator.pipeline.vae)]
    if generator is not None and stretches:
        chosen["image_fit"] = generator.pipeline.config.image_fit
    # Real images are cropped at their centre and not mirrored, so that the same images are the same in any run.
    chosen |= {"random_flip": False, "center_crop": True, "crop_scale": 1.0}
    if not (chosen.get("dataset_name") or chosen.get("train_data_dir")):
        raise UserError("--dataset_name is missing: the model is not in a run with a config.yaml that names its data")
    data = kind(**chosen)
    data.validate()
    return data


def _control_kind(generator: ImageGenerator) -> tuple[int, Any]:
    """Return the number of classes of a control (0 if it has none), and how its images are read."""
    net = generator.pipeline.controlnet.config
    classes = net.conditioning_channels if net.control_kind == "classes" else 0
    return classes, {"image": "rgb", "masks": "l"}.get(net.control_kind)
