"""Sources of training data: the flags that name them, and loading with `datasets`.

Nothing here scans or maps the rows, so that a million rows open as fast as a hundred.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from pipelines.tools.cli import UserError, nearest
from pipelines.tools.credentials import mask_credentials
from training.core.draws import mix
from training.core.options import Options, option
from training.data.archives import is_archive, unpacked
from training.data.column_types import may_hold_images
from training.data.folder_account import FolderAccount
from training.data.folder_captions import CaptionSource
from training.data.image_folder import open_image_folder
from training.data.image_paths import refuse_foreign_paths
from training.data.local_names import flag_of, found_here, is_image_folder
from training.data.records import files_state, rows_key
from training.data.shards.opening import block_order, open_remote_shards, open_shards
from training.data.shards.remote import is_remote
from training.data.shards.sources import commit_of, names_hub
from training.data.table_files import is_saved, load_local
from training.data.transforms import TRANSFORM_VERSION

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_ROWS_PER_READ = 10_000


@dataclass
class DataConfig(Options):
    """Source of the images, its columns, and how images are cropped."""

    help_group = "Data"
    image_modes: ClassVar[tuple[str, ...]] = ("rgb", "rgba", "l")
    """Values of `image_mode` that a command can train with"""

    dataset_name: str | None = option(None, content="data", essential=True, replaces=["train_data_dir"])
    """Training data: a Hub id, a folder or file (images, Parquet, JSON, save_to_disk), or URLs of shards to stream"""
    dataset_config_name: str | None = option(None)
    """Configuration of the dataset, if it has several"""
    dataset_revision: str = option("auto", content="data", kept=True)
    """Commit, branch or tag of a Hub dataset; auto is the newest commit; with --streaming true, a run keeps the commit
    that it was started with"""
    train_data_dir: str | None = option(None, content="data", essential=True, replaces=["dataset_name"])
    """Folder of images, with captions in a table or in text files beside the images, and/or one subfolder per class;
    replaces --dataset_name"""
    image_column: str = option("image")
    """Column with the images"""
    caption_column: str = option("text", essential=True)
    """Column with the captions: a text, or a list of texts of which one is drawn each time"""
    caption_source: CaptionSource = option("auto")
    """Captions of a folder of images: auto reads a table (such as metadata.csv) or text files beside the images;
    file_name and folder_name take the names of the files or of their folders as captions"""
    label_column: str = option("label")
    """Column with the class labels, one for each row: texts, whole numbers (each number is the name of a class, so that
    the years 1985 to 2020 are 36 classes), or true and false"""
    streaming: bool = option(False)
    """Read the images where they are: in tar files of WebDataset, or in Parquet files, on a disk, at URLs or on the
    Hub, which are neither unpacked nor copied. Shards are read nearly in turn, in an order that changes in each epoch;
    with --latent_cache, so are its shards"""
    shuffle_buffer: int = option(10_000, at_least=1)
    """With --streaming true: number of rows, of blocks from all over the data, that are shuffled together"""
    mask_column: str = option("mask")
    """Column with segmentation masks (8-bit grey, one class id per pixel) of the same size as the images; used only
    by the segmentation head of train_autoencoder.py, precompute_latents.py and check_dataset.py"""
    conditioning_image_column: list[str] | str = option("conditioning_image")
    """Column with control images of the same size as the images, or a list of such columns; used only by
    train_controlnet.py and check_dataset.py"""
    conditioning_image_mode: Literal["rgb", "l"] | None = option(None)
    """How train_controlnet.py reads control images: rgb reads one column in colour (three channels); l reads each
    column in grey (one channel). If unset, rgb for a single column name, l for a list of columns"""
    train_split: str = option("train")
    """Split to train on"""
    validation_split: str = option("validation")
    """Split to validate on; if it does not exist, --validation_fraction of the training split is held out"""
    validation_fraction: float = option(0.05, at_least=0, below=1)
    """Fraction of the training split held out for validation if the dataset has no validation split; 0 disables it"""
    resolution: int = option(64, at_least=8, essential=True)
    """Size of the square training images in pixels; images are cropped to a square and resized to it"""
    image_mode: Literal["rgb", "rgba", "l"] = option("rgb")
    """What images are trained as: rgb (three channels; transparent images on white), rgba (four channels, with
    transparency) or l (grey, one channel); others than rgb work in train_autoencoder.py, train_latent_diffusion.py and
    precompute_latents.py"""
    aspect_buckets: bool = option(False)
    """Train on images that are not square: in a few sizes of about --resolution squared pixels, chosen by the aspect
    ratios of the images; each image is cropped to the nearest size, and a batch has images of one size"""
    pad_to_square: bool = option(False)
    """Keep whole images: those that are not square are padded with white (with transparency if --image_mode is rgba)
    instead of cropped"""
    center_crop: bool = option(True)
    """Crop images that are not square at their centre; false crops them at a random place, which changes in each
    epoch"""
    crop_scale: float = option(1.0, at_least=0.1, at_most=1)
    """Side of the smallest random crop, relative to the largest possible square; below 1, each sample is a square of
    random size at a random place, another one in each epoch, which trains an autoencoder well on few images"""
    random_flip: bool = option(False)
    """Flip images (and their masks and control images) horizontally with probability 0.5"""
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "nearest"] = option("lanczos")
    """Interpolation for resizing images and control images (masks and class ids: always nearest)"""
    on_bad_sample: Literal["error", "skip"] = option("error", on_resume="warn")
    """What to do about a broken image, an empty caption or an invalid label: error stops and names the row, skip uses
    the next good row instead"""
    max_train_samples: int | None = option(None, at_least=1)
    """Number of training rows to use, drawn at random with --seed; if unset, all"""

    @property
    def source(self) -> str:
        """The Hub id, folder or file of the data; empty if none is given."""
        return self.dataset_name or self.train_data_dir or ""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.dataset_name and self.train_data_dir:
            raise UserError(
                f"both dataset_name ({self.dataset_name}) and train_data_dir ({self.train_data_dir}) are given; "
                "keep one"
            )
        if self.image_mode not in self.image_modes:
            raise UserError(
                f"--image_mode {self.image_mode} works only in train_autoencoder.py, train_latent_diffusion.py and "
                "precompute_latents.py, because the networks of this command take colour images; leave it out"
            )
        if self.pad_to_square and self.aspect_buckets:
            raise UserError("--pad_to_square and --aspect_buckets both keep whole images; set one of them to false")
        if self.streaming and self.aspect_buckets:
            raise UserError(
                "--streaming true and --aspect_buckets true cannot be combined, because the sizes of all images would "
                "have to be read first; leave one of them out"
            )
        columns = self.conditioning_image_column
        if self.conditioning_image_mode == "rgb" and not isinstance(columns, str) and len(columns) > 1:
            raise UserError(
                "--conditioning_image_mode rgb reads one column, but --conditioning_image_column names "
                f"{', '.join(columns)}; name one of them, or use l to read each of them as one grey channel"
            )

    def kept_revision(self, saved: Mapping[str, Any]) -> str:
        """Return the revision that a run with this saved config continues with. The commit of another dataset than
        the configured one is not kept."""
        same = saved.get("dataset_name") == self.dataset_name
        left_open = self.dataset_revision == DataConfig.dataset_revision
        return str(same and left_open and saved.get("dataset_revision") or self.dataset_revision)

    def keep(self, saved: dict[str, Any]) -> None:
        """See `Options.keep`; of `dataset_revision`, see `kept_revision`."""
        super().keep({**saved, "dataset_revision": self.kept_revision(saved)})

    def pinned(self) -> dict[str, Any]:
        """See `Options.pinned`: the commit of a dataset on the Hub that is streamed."""
        commit = _commit(self)
        return super().pinned() | ({} if commit is None else {"dataset_revision": commit})


def load_split(config: DataConfig, split: str, seed: int) -> Dataset:
    """Open one split of the configured source, without decoding it.

    Args:
        split: "train" or "validation", whose names in the source are config.train_split and config.validation_split,
            or another split by its own name. If the validation split does not exist, `validation_fraction` of the
            training rows is held out, chosen by `seed`; the result is empty if that fraction is 0.
        seed: chooses the held-out rows and those of `max_train_samples`.

    Raises:
        UserError: the dataset or split does not exist or has no rows.
    """
    splits = load_all_splits(config)
    name = {"train": config.train_split, "validation": config.validation_split}.get(split, split)
    held_out = config.validation_split not in splits and config.validation_split == DataConfig().validation_split
    if split == "validation" and held_out:
        return _hold_out(named_split(config, splits, config.train_split), config, seed)[1]
    dataset = named_split(config, splits, name)
    if split != "train":
        return dataset
    if held_out:
        dataset = _hold_out(dataset, config, seed)[0]
    if config.max_train_samples is not None and config.max_train_samples < len(dataset):
        order = _random_order(dataset, mix(seed, "max_train_samples"))
        dataset = dataset.select(np.sort(order[: config.max_train_samples]))
    return dataset


def load_all_splits(config: DataConfig) -> DatasetDict:
    """Open every split of the configured source.

    Raises:
        UserError: the source is not given, does not exist, or cannot be read.
    """
    if not config.source:
        raise UserError("no training data is given; set --dataset_name (Hub id, folder or file) or --train_data_dir")
    return _opened(config).splits


def stored_rows_key(dataset: Dataset, config: DataConfig) -> str | None:
    """Return a key for records about these rows of the configured source, or None (see `training.data.records`)."""
    return rows_key(dataset, _opened(config).state)


def folder_account(config: DataConfig) -> FolderAccount | None:
    """Return what each file of the source became, if it is a folder of images; None for other sources."""
    return _opened(config).account


class OpenedSource(NamedTuple):
    """A source that is open."""

    splits: DatasetDict
    state: str | None
    """State of its files (see `files_state`); None for a Hub dataset that is not streamed"""
    account: FolderAccount | None


def _opened(config: DataConfig) -> OpenedSource:
    """Open the configured source, or return it if it is open."""
    reading = (config.caption_source, config.streaming, _commit(config) or config.dataset_revision)
    name, imagefolder = config.source, bool(config.train_data_dir)
    return _open_source(name, os.getcwd(), imagefolder, config.dataset_config_name, config.train_split, *reading)


def _commit(config: DataConfig) -> str | None:
    """Return the commit that is read of a dataset on the Hub that is streamed; None for other sources."""
    name = config.source
    if not config.streaming or config.train_data_dir or not names_hub(name):
        return None
    if not is_remote(name) and found_here(name, os.getcwd(), imagefolder=False).local:
        return None
    return commit_of(name, config.dataset_revision)


@functools.lru_cache(maxsize=4)
def _open_source(
    name: str,
    base: str,
    imagefolder: bool,
    config_name: str | None,
    only_split: str,
    captions: CaptionSource,
    streaming: bool,
    revision: str,
) -> OpenedSource:
    import datasets

    path, files, local = found_here(name, base, imagefolder)
    if is_remote(name) and not streaming:
        raise UserError(f"{mask_credentials(name)} is a URL; add --streaming true to read its shards where they are")
    account = None
    if streaming and not local:
        return OpenedSource(*open_remote_shards(name, config_name, revision), None)
    try:
        state = files_state(*(files or [path])) if local else None
        if streaming:
            return OpenedSource(open_shards(path, files), state, None)
        archive = path if path.is_file() and is_archive(path) else None
        path = unpacked(path) if archive else path
        if state and path.is_dir() and not is_saved(path) and (imagefolder or is_image_folder(path)):
            loaded, account = open_image_folder(path, captions, state, shown=archive or path)
        elif captions != "auto":
            raise UserError(
                f"--caption_source is {captions}, but {name} is not a folder of images; name the column of its "
                "captions with --caption_column, or remove --caption_source"
            )
        elif local:
            loaded = load_local(files or path, config_name, only_split)
        else:
            loaded = datasets.load_dataset(name, config_name, revision=None if revision == "auto" else revision)
    except (
        OSError,
        ValueError,
        LookupError,  # raised for an empty table saved to disk
        datasets.exceptions.DatasetsError,
        datasets.exceptions.DatasetBuildError,
    ) as error:
        raise UserError(_explain_load_error(name, local, flag_of(imagefolder), error)) from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict({only_split: loaded})
    return OpenedSource(splits, state, account)


def require_column(dataset: Dataset, name: str, flag: str) -> None:
    """Check that the dataset has a column.

    Raises:
        UserError: the column does not exist; the message names the most similar column and all that exist.
    """
    if name not in dataset.column_names:
        images = [column for column, kind in dataset.features.items() if type(kind).__name__ == "Image"]
        hint = f" (column '{images[0]}' has images)" if flag == "image_column" and len(images) == 1 else ""
        raise UserError(
            f"the dataset has no column '{name}'{hint or nearest(name, dataset.column_names)}; "
            f"its columns are {', '.join(dataset.column_names)}: choose one with --{flag}"
        )


def column_values(dataset: Dataset, column: str) -> Iterator[Any]:
    """Yield the values of a column in order, with a few thousand in memory at a time."""
    narrow = dataset.select_columns([column])
    for start in range(0, len(narrow), _ROWS_PER_READ):
        yield from narrow[start : start + _ROWS_PER_READ][column]


def distinct_values(dataset: Dataset, column: str) -> Iterable[Any]:
    """Return the values of a column, each at least once; without a Python object for each row if possible."""
    import pyarrow

    if dataset._indices is None:
        with contextlib.suppress(pyarrow.ArrowNotImplementedError):
            return dataset.data.column(column).unique().to_pylist()
    return column_values(dataset, column)


def row_id(dataset: Dataset, index: int) -> int:
    """Return the row's number in the stored split, from which `dataset` may be a selection of rows."""
    indices = dataset._indices  # datasets stores the selection here and has no public function for it
    return index if indices is None else indices.column(0)[index].as_py()


def transform_fingerprint(config: DataConfig) -> str:
    """Describe everything that determines the pixels of a row; equal transforms have equal descriptions.

    Flips are left out, because they are chosen for each sample afterwards.
    """
    crop = "center" if config.center_crop else "random"
    crop += f"-{config.crop_scale:g}" if config.crop_scale < 1 else ""
    crop += "-to-aspect-bucket" if config.aspect_buckets else "-of-padded" if config.pad_to_square else ""
    mode = f" {config.image_mode}" if config.image_mode != "rgb" else ""
    return f"v{TRANSFORM_VERSION} {config.resolution}px {crop}-crop {config.image_interpolation_mode}{mode}"


def undecoded_images(dataset: Dataset, column: str, flag: str, config: DataConfig) -> Dataset:
    """Return `dataset` with `column` as {"bytes", "path"}, so that we decode the images and report their errors.

    Args:
        flag: the flag that names the column, for messages.
        config: the source that the dataset was opened from; only files in its folder may be named in the column.

    Raises:
        UserError: the column holds neither images nor file names nor bytes, or it names files of other folders.
    """
    import datasets

    feature: Any = dataset.features[column]
    if not may_hold_images(feature):
        images = [name for name, other in dataset.features.items() if isinstance(other, datasets.Image)]
        hint = f"; column '{images[0]}' does" if images else ""
        raise UserError(f"column '{column}' holds {feature}, not images{hint}: choose one with --{flag}")
    undecoded = dataset.cast_column(column, datasets.Image(decode=False))
    refuse_foreign_paths(undecoded, column, config.source, streaming=config.streaming)
    return undecoded


def named_split(config: DataConfig, splits: DatasetDict, name: str) -> Dataset:
    """Return the whole split of this name.

    Raises:
        UserError: it does not exist (the message names the most similar one) or has no rows.
    """
    known = list(splits)
    if name not in splits:
        flag = {config.train_split: "--train_split", config.validation_split: "--validation_split"}.get(
            name, "the flag that names the split"
        )
        raise UserError(
            f"the dataset has no split '{name}'{nearest(name, known)}; "
            f"it has {', '.join(known)}: choose one with {flag}"
        )
    if not len(splits[name]):
        raise UserError(f"split '{name}' of {config.source} has no rows; add images to it")
    return splits[name]


def _hold_out(dataset: Dataset, config: DataConfig, seed: int) -> tuple[Dataset, Dataset]:
    """Return (training rows, held-out rows), both in the order in which they are stored."""
    rows = len(dataset)
    count = min(rows - 1, max(1, round(rows * config.validation_fraction))) if config.validation_fraction else 0
    order = _random_order(dataset, mix(seed, "validation_fraction"))
    return dataset.select(np.sort(order[count:])), dataset.select(np.sort(order[:count]))


def _random_order(dataset: Dataset, seed: int) -> np.ndarray:
    """Return all rows in a random order: of streamed data block by block, so that few rows are in few shards."""
    generator = np.random.default_rng(seed)
    order = block_order(dataset, generator)
    return generator.permutation(len(dataset)) if order is None else order


def _cache_problem() -> str | None:
    """Return why `datasets` cannot write its cache, which it needs to open a folder of images; None if it can."""
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as file:
            file.write(bytes(4096))
    except OSError as error:
        return (
            f"the cache folder {cache} cannot be written ({error.strerror}); set the environment variable HF_HOME to a "
            "folder that can, with space for a copy of the data"
        )
    return None


def _explain_load_error(name: str, local: bool, flag: str, error: BaseException) -> str:
    if (problem := _cache_problem()) is not None:
        return f"dataset '{name}' cannot be read: {problem}"
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split())[:300] or type(cause).__name__
    if local:
        return f"dataset '{name}' cannot be read ({reason}); {flag} takes a folder of images, Parquet or JSON files"
    return (
        f"dataset '{name}' is not a local folder and cannot be downloaded from the Hub ({reason}); "
        f"check {flag}, the network and the login"
    )
