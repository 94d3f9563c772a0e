"""Columns as programs other than `datasets` write them: images without a type, and paths relative to their table.

pandas, polars and pyarrow store an image as its bytes, as {"bytes", "path"}, or as the path of its file. Such a column
gets the type `datasets.Image`, so that everything else need not know who wrote it.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tools.files import image_suffixes, open_image_file
from training.data.caption_tables import FILE_COLUMNS, caption_columns, usual_column

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

_TEXTS = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view")
_VIEWS = {"string_view": "string", "binary_view": "binary"}


def may_hold_images(feature: Any) -> bool:
    """Return whether a column of this type can be read as images: bytes, paths, or {"bytes", "path"}."""
    import datasets

    if isinstance(feature, dict):
        fields = {name: str(getattr(value, "dtype", value)) for name, value in feature.items()}
        known = {"bytes": (*_BYTES, "null"), "path": (*_TEXTS, "null")}
        return bool(fields) and all(kind in known.get(name, ()) for name, kind in fields.items())
    return isinstance(feature, datasets.Image) or str(getattr(feature, "dtype", "")) in (*_TEXTS, *_BYTES)


def with_typed_images(dataset: Dataset, folder: Path) -> Dataset:
    """Return a dataset whose columns of images have the type `datasets.Image`.

    If a column gets this type here, and no column is called `image`, the only one is called so as well; if none is
    called `text`, so is the only column with a usual name for captions.

    Args:
        folder: the folder that relative paths begin at: that of the file which contains the rows.
    """
    import datasets

    if not len(dataset):
        return dataset
    for name, feature in dataset.features.items():
        if (kind := _VIEWS.get(str(getattr(feature, "dtype", "")))) is not None:
            dataset = dataset.cast_column(name, datasets.Value(kind))
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    found = [name for name in dataset.column_names if name not in images and _is_image(dataset, name)]
    for name in found:
        dataset = dataset.cast_column(name, datasets.Image())
    if not (images or found) and (name := _path_column(dataset)) is not None:
        dataset = dataset.cast_column(name, datasets.Image())
        found = [name]
    for name in found:
        dataset = _with_paths_from(dataset, name, folder)
    return _with_usual_names(dataset, found) if found else dataset


def _is_image(dataset: Dataset, name: str) -> bool:
    """Return whether the first value of a column is an image, or names the file of one in {"bytes", "path"}."""
    feature = dataset.features[name]
    kind = str(getattr(feature, "dtype", ""))
    if kind not in _BYTES and not (isinstance(feature, dict) and may_hold_images(feature)):
        return False
    value = _first(dataset, name)
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if content is None:
        return _names_an_image(path)
    try:
        open_image_file(io.BytesIO(content)).close()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def _path_column(dataset: Dataset) -> str | None:
    """Return the column of texts with the names of image files: `image`, or the first of the usual names."""
    texts = [name for name, feature in dataset.features.items() if str(getattr(feature, "dtype", "")) in _TEXTS]
    named = [name for name in texts if _names_an_image(_first(dataset, name))]
    return usual_column(named, ("image", *FILE_COLUMNS)) or (named[0] if len(named) == 1 else None)


def _names_an_image(value: Any) -> bool:
    return isinstance(value, str) and os.path.splitext(value)[1].lower() in image_suffixes()


def _first(dataset: Dataset, name: str) -> Any:
    """Return the first value of a column that is not missing; None if all are."""
    column = dataset.data.column(name)
    for chunk in column.chunks:
        present = chunk.drop_null()
        if len(present):
            return present[0].as_py()
    return None


def _with_paths_from(dataset: Dataset, name: str, folder: Path) -> Dataset:
    """Return the dataset with the relative paths of a column of images counted from `folder`."""
    import datasets
    import pyarrow

    column = dataset.data.column(name)
    arrays = [_joined_paths(chunk, folder) for chunk in column.chunks]
    if all(new is old for new, old in zip(arrays, column.chunks, strict=True)):
        return dataset
    index, features = dataset.column_names.index(name), dataset.features
    table = dataset.data.table.set_column(index, name, pyarrow.chunked_array(arrays, datasets.Image().pa_type))
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))


def _joined_paths(images: pyarrow.StructArray, folder: Path) -> pyarrow.StructArray:
    """Return images whose relative paths are joined to `folder`; the same array if there are none.

    A path that exists in the current folder alone stays relative to it.
    """
    import pyarrow

    contents, paths = images.field("bytes"), images.field("path").to_pylist()
    without_bytes = contents.is_null().to_pylist()
    changed = False
    for i, path in enumerate(paths):
        if path and without_bytes[i] and not os.path.isabs(path) and "://" not in path:
            written = path.replace("\\", "/")
            joined = os.path.join(folder, written)
            if os.path.exists(joined) or not os.path.exists(path):
                paths[i], changed = joined, True
    if not changed:
        return images
    arrays = [contents, pyarrow.array(paths, pyarrow.string())]
    return pyarrow.StructArray.from_arrays(arrays, ["bytes", "path"], mask=images.is_null())


def _with_usual_names(dataset: Dataset, images: list[str]) -> Dataset:
    """Return the dataset with columns `image` and `text`, if it is clear which columns they are."""
    captions = caption_columns(dataset.column_names)
    if "image" not in dataset.column_names and len(images) == 1:
        dataset = _with_copy(dataset, images[0], "image")
    if "text" not in dataset.column_names and len(captions) == 1:
        dataset = _with_copy(dataset, captions[0], "text")
    return dataset


def _with_copy(dataset: Dataset, column: str, name: str) -> Dataset:
    """Return the dataset with a second column of the same values, which takes no memory."""
    import datasets

    features = datasets.Features({**dataset.features, name: dataset.features[column]})
    table = dataset.data.table.append_column(name, dataset.data.table.column(column))
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))
