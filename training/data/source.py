"""Where training data comes from: the flags that name it, and any source that `datasets` loads.

Nothing scans or maps the data here, so a million rows open as fast as a hundred.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipelines.tools.cli import UserError, nearest
from training.core.draws import mix
from training.core.options import Options, option
from training.data.transforms import TRANSFORM_VERSION

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_FILE_LOADERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
_ROWS_PER_READ = 10_000
# Names of split folders, as `datasets` knows them.
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass
class DataConfig(Options):
    """Where the pictures are, which columns hold what, and how they are cut."""

    dataset_name: str | None = option(None)
    """Training data: a Hub id, or a local folder or file (imagefolder, Parquet, JSON, or written by save_to_disk)"""
    dataset_config_name: str | None = option(None)
    """Configuration of the dataset, for those that have several"""
    train_data_dir: str | None = option(None)
    """Folder of pictures, with captions in metadata.jsonl and/or one subfolder per class; instead of dataset_name"""
    image_column: str = option("image")
    """Column with the pictures"""
    caption_column: str = option("text")
    """Column with the captions: a text, or a list of texts of which one is drawn each time"""
    label_column: str = option("label")
    """Column with the classes: class names, or numbers from 0"""
    mask_column: str = option("mask")
    """Column with segmentation masks (8-bit grey, a class id per pixel), the size of their pictures"""
    conditioning_image_column: list[str] | str = option("conditioning_image")
    """Column with control images, the size of their pictures; or a list of such columns"""
    conditioning_image_mode: Literal["rgb", "l"] | None = option(None)
    """How control images are read: rgb, one column in colour (three channels); l, each column in grey (one channel).
    Unset: rgb for a column given by its name, l for a list of columns"""
    train_split: str = option("train")
    """Split to train on"""
    validation_split: str = option("validation")
    """Split to validate on; without one, validation_fraction of the training split is held out"""
    validation_fraction: float = option(0.05, at_least=0, below=1)
    """Share of the training split held out for validation when the dataset has no validation split; 0 for none"""
    resolution: int = option(64, at_least=8)
    """Training pictures are squares of this many pixels"""
    center_crop: bool = option(True)
    """Cut the middle of pictures that are not square; false cuts at a random place, another in each epoch"""
    random_flip: bool = option(False)
    """Mirror half of the pictures, others in each epoch"""
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "nearest"] = option("lanczos")
    """How pictures of another size are scaled"""
    on_bad_sample: Literal["error", "skip"] = option("error", on_resume="warn")
    """A broken picture, an empty caption or an impossible label: stop and name the row, or take the next good row"""
    max_train_samples: int | None = option(None, at_least=1)
    """Train on this many rows only, drawn by seed; for trying things out"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.dataset_name and self.train_data_dir:
            raise UserError(
                f"both dataset_name ({self.dataset_name}) and train_data_dir ({self.train_data_dir}) are given; "
                "keep one"
            )
        columns = self.conditioning_image_column
        if self.conditioning_image_mode == "rgb" and not isinstance(columns, str) and len(columns) > 1:
            raise UserError(
                "--conditioning_image_mode rgb reads one column, but --conditioning_image_column names "
                f"{', '.join(columns)}; name one of them, or take l for a grey channel each"
            )


def load_split(config: DataConfig, split: str, seed: int) -> Dataset:
    """One split of the configured source, opened but not decoded.

    Args:
        split: "train" or "validation" (whatever names config.train_split and config.validation_split give them), or
            another split by its own name. Without a validation split a seeded `validation_fraction` of the training
            rows is held out, the same for the same seed and data; the result is empty if that fraction is 0.
        seed: of the held-out rows and of `max_train_samples`.

    Raises:
        UserError: no such dataset or split, or no rows.
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
        order = np.random.default_rng(mix(seed, "max_train_samples")).permutation(len(dataset))
        dataset = dataset.select(np.sort(order[: config.max_train_samples]))
    return dataset


def load_all_splits(config: DataConfig) -> DatasetDict:
    """Every split of the configured source.

    Raises:
        UserError: the source is not given, does not exist, or cannot be read.
    """
    name = config.dataset_name or config.train_data_dir
    if not name:
        raise UserError("no training data was named; give --dataset_name (Hub id, folder or file) or --train_data_dir")
    return _open_source(name, bool(config.train_data_dir), config.dataset_config_name, config.train_split)


@functools.lru_cache(maxsize=4)
def _open_source(name: str, imagefolder: bool, config_name: str | None, only_split: str) -> DatasetDict:
    """See `load_all_splits`. Remembered, because `datasets` looks at every file of a folder each time it opens it."""
    import datasets

    path = Path(name).expanduser()
    local = path.exists()
    flag = "--train_data_dir" if imagefolder else "--dataset_name"
    if not local and (imagefolder or _looks_local(name)):
        raise UserError(f"dataset '{name}' does not exist; check the path given by {flag}")
    try:
        if local:
            loaded = _load_local(path, imagefolder, config_name, only_split)
        else:
            loaded = datasets.load_dataset(name, config_name)
    except (
        OSError,
        ValueError,
        LookupError,  # an empty table saved to disk
        datasets.exceptions.DatasetsError,
        datasets.exceptions.DatasetBuildError,
    ) as error:
        raise UserError(_explain_load_error(name, local, flag, error)) from error
    return loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict({only_split: loaded})


def require_column(dataset: Dataset, name: str, flag: str) -> None:
    """Refuse a column that the dataset lacks.

    Raises:
        UserError: naming the nearest column and those there are.
    """
    if name not in dataset.column_names:
        raise UserError(
            f"the dataset has no column '{name}'{nearest(name, dataset.column_names)}; "
            f"its columns are {', '.join(dataset.column_names)}: choose one with --{flag}"
        )


def column_values(dataset: Dataset, column: str) -> Iterator[Any]:
    """A column's values in order, a few thousand in memory at a time."""
    narrow = dataset.select_columns([column])
    for start in range(0, len(narrow), _ROWS_PER_READ):
        yield from narrow[start : start + _ROWS_PER_READ][column]


def row_id(dataset: Dataset, index: int) -> int:
    """The row's number in the split as stored, where `dataset` may be a selection of its rows."""
    indices = dataset._indices  # datasets keeps the selection here and has no public way to ask for it
    return index if indices is None else indices.column(0)[index].as_py()


def transform_fingerprint(config: DataConfig) -> str:
    """Everything that decides the pixels of a row, in words: two transforms are the same when these are equal.

    Flips are left out: they are a choice per sample, made after this.
    """
    crop = "center" if config.center_crop else "random"
    return f"v{TRANSFORM_VERSION} {config.resolution}px {crop}-crop {config.image_interpolation_mode}"


def undecoded_images(dataset: Dataset, column: str, flag: str) -> Dataset:
    """`dataset` with `column` as {"bytes", "path"}, so that decoding, and its errors, are ours.

    Raises:
        UserError: the column holds no pictures, file names or bytes.
    """
    import datasets

    feature: Any = dataset.features[column]
    if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", None) not in (
        "string",
        "large_string",
        "binary",
        "large_binary",
    ):
        images = [name for name, other in dataset.features.items() if isinstance(other, datasets.Image)]
        hint = f"; '{images[0]}' does" if images else ""
        raise UserError(f"column '{column}' holds {feature}, not pictures{hint}: choose one with --{flag}")
    return dataset.cast_column(column, datasets.Image(decode=False))


def named_split(config: DataConfig, splits: DatasetDict, name: str) -> Dataset:
    """The whole split of this name.

    Raises:
        UserError: there is none (naming the nearest), or it has no rows.
    """
    known = list(splits)
    if name not in splits:
        flag = {config.train_split: "--train_split", config.validation_split: "--validation_split"}.get(
            name, "the split's name"
        )
        raise UserError(
            f"the dataset has no split '{name}'{nearest(name, known)}; "
            f"it has {', '.join(known)}: choose one with {flag}"
        )
    if not len(splits[name]):
        raise UserError(
            f"split '{name}' of {config.dataset_name or config.train_data_dir} has no rows; give it some pictures"
        )
    return splits[name]


def _hold_out(dataset: Dataset, config: DataConfig, seed: int) -> tuple[Dataset, Dataset]:
    """(training rows, held-out rows), both in the order in which they are stored."""
    rows = len(dataset)
    count = min(rows - 1, max(1, round(rows * config.validation_fraction))) if config.validation_fraction else 0
    order = np.random.default_rng(mix(seed, "validation_fraction")).permutation(rows)
    return dataset.select(np.sort(order[count:])), dataset.select(np.sort(order[:count]))


def _load_local(path: Path, imagefolder: bool, config_name: str | None, only_split: str) -> Dataset | DatasetDict:
    import datasets

    if path.is_file():
        loader = _FILE_LOADERS.get(path.suffix)
        if loader is None:
            known = ", ".join(_FILE_LOADERS)
            raise UserError(
                f"{path} is a {path.suffix or 'nameless'} file; a dataset is a folder, or a file of {known}"
            )
        return datasets.load_dataset(loader, data_files={only_split: str(path)})
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return datasets.load_from_disk(path)
    if imagefolder or _has_metadata(path):
        files = _imagefolder_splits(path)
        return datasets.load_dataset("imagefolder", config_name, data_dir=str(path), data_files=files)
    return datasets.load_dataset(str(path), config_name, cache_dir=_cache_of_these_files(path, config_name))


def _cache_of_these_files(path: Path, config_name: str | None) -> str | None:
    """A cache folder of this state of a dataset whose README.md lists its files; None takes the usual one.

    `datasets` (seen with 5.2) knows such a folder by its path alone, and gives the old rows for new files.
    """
    import datasets
    from datasets.fingerprint import Hasher

    if not (path / "README.md").is_file():
        return None
    files = datasets.load_dataset_builder(str(path), config_name).config.data_files
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"files-{Hasher.hash(files)}")


def _has_metadata(path: Path) -> bool:
    """Whether a folder, or a split in it, says that it is an imagefolder."""
    folders = [path, *(path / word for words in _SPLIT_FOLDERS.values() for word in words)]
    return any((folder / name).is_file() for folder in folders for name in ("metadata.jsonl", "metadata.csv"))


def _imagefolder_splits(path: Path) -> dict[str, list[str]] | None:
    """Glob patterns of the splits of an imagefolder; None leaves finding them to `datasets`.

    It looks through all files once for each of 66 patterns, at every start: 98 s for 100,000 files, 13 s with the
    patterns from here.
    """
    folders = {entry.name for entry in path.iterdir() if entry.is_dir()}
    splits = {
        split: [f"{word}/**" for word in words if word in folders]
        for split, words in _SPLIT_FOLDERS.items()
        if folders.intersection(words)
    }
    if splits:
        return splits
    words = {word for words in _SPLIT_FOLDERS.values() for word in words}
    deeper = any((path / folder / word).is_dir() for folder in folders for word in words)
    return None if deeper or not any(path.iterdir()) else {"train": ["**"]}


def _looks_local(name: str) -> bool:
    """Whether a name that is no path here was meant as one, so that nobody waits for the Hub to say so."""
    path = Path(name)
    in_folder_here = len(path.parts) > 1 and path.parent.is_dir()
    return (
        path.is_absolute() or name.startswith((".", "~")) or bool(path.suffix) or len(path.parts) > 2 or in_folder_here
    )


def _explain_load_error(name: str, local: bool, flag: str, error: BaseException) -> str:
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split())[:300] or type(cause).__name__
    if local:
        return f"dataset '{name}' cannot be read ({reason}); {flag} takes a folder of pictures, Parquet or JSON files"
    return (
        f"dataset '{name}' is no folder here and did not come from the Hub ({reason}); "
        f"check {flag}, the network and the login"
    )
