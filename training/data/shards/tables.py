"""The rows of one shard as a table: captions and classes by value, images by their place in the shard."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipelines.tools.cli import UserError, one_line
from pipelines.tools.files import image_suffixes
from training.data.caption_tables import caption_columns
from training.data.column_types import may_hold_images
from training.data.folder_layout import CAPTION_SUFFIXES
from training.data.shards.places import place_in_parquet, place_in_tar

if TYPE_CHECKING:
    import pyarrow

BLOCK_COLUMN = "__block__"
"""Column with the number of the block of rows within the shard. The rows of a block are read one after another."""
# Number of images in a row of a tar file that are a block: few enough to mix shards, and enough to read at once.
BLOCK_ROWS = 256
MOST_BYTES_OF_GROUP = 2**30
_MOST_BYTES_OF_TEXT = 2**20
SUFFIXES = (".tar", ".parquet")


def table_of_shard(file: Path) -> pyarrow.Table:
    """Return the rows of a shard, after one pass over the headers of a tar file, or the small columns of a Parquet
    file.

    Raises:
        UserError: the shard is damaged or has no images.
    """
    return _table_of_tar(file) if file.suffix.lower() == ".tar" else _table_of_parquet(file)


def _table_of_tar(file: Path) -> pyarrow.Table:
    """Return the rows of a shard of WebDataset: files of the same name up to its first dot are a sample."""
    import datasets
    import pyarrow

    samples: dict[str, dict[str, Any]] = {}
    try:
        # "r:" refuses compressed archives, in which no place can be read without all that is before it.
        with tarfile.open(file, "r:", encoding="utf-8") as opened:
            for info in opened:
                name = PurePosixPath(info.name)
                if not info.isreg() or any(part.startswith((".", "__")) for part in name.parts):
                    continue
                stem, _, ending = name.name.partition(".")
                sample = samples.setdefault(str(name.parent / stem), {})
                _take(sample, opened, info, ending.lower(), str(file))
            _require_end(file, opened.offset)
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise UserError(
            f"the shard {file} cannot be read ({one_line(error, 200)}); it is damaged or incomplete, or compressed: "
            "download or make it again, as a plain tar file"
        ) from None
    rows = [sample for sample in samples.values() if sample.get("image")]
    if not rows:
        raise UserError(f"the shard {file} has no images that can be read; remove it from the data")
    names = list(dict.fromkeys(name for row in rows for name in row))
    kinds = {name: pyarrow.string() if name in ("text", "label") else datasets.Image().pa_type for name in names}
    columns = {name: pyarrow.array([row.get(name) for row in rows], kinds[name]) for name in names}
    columns[BLOCK_COLUMN] = pyarrow.array([row // BLOCK_ROWS for row in range(len(rows))], pyarrow.int32())
    images = [name for name in names if name not in ("text", "label")]
    return _typed(pyarrow.table(columns), dict.fromkeys(images, datasets.Image()))


def _require_end(file: Path, offset: int) -> None:
    """Raise ReadError unless the mark of the end of a tar file is at `offset`: `tarfile` takes damage for the end."""
    with file.open("rb") as opened:
        opened.seek(offset)
        if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"there is neither a file nor the mark of the end at byte {offset:,}")


def _take(sample: dict[str, Any], opened: tarfile.TarFile, info: tarfile.TarInfo, ending: str, file: str) -> None:
    """Add a file of a sample: an image (jpg), another one (mask.png), a caption (txt or json) or a class (cls)."""
    column, _, kind = ending.rpartition(".")
    if f".{kind}" in image_suffixes():
        place = place_in_tar(file, info.name, info.offset_data, info.size)
        sample.setdefault(column or "image", {"bytes": None, "path": place})
    elif f".{ending}" in CAPTION_SUFFIXES:
        sample["text"] = " ".join(_text(opened, info).split())
    elif ending == "cls":
        sample["label"] = " ".join(_text(opened, info).split()) or None
    elif ending == "json":
        caption = _caption_in(_text(opened, info))
        if caption is not None:
            sample.setdefault("text", caption)


def _text(opened: tarfile.TarFile, info: tarfile.TarInfo) -> str:
    content = opened.extractfile(info)
    assert content is not None  # it is a plain file
    return content.read(_MOST_BYTES_OF_TEXT).decode("utf-8", "replace")


def _caption_in(text: str) -> str | None:
    """Return the caption in a JSON file beside an image: its only value with a usual name for captions."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    names = caption_columns(values) if isinstance(values, Mapping) else []
    name = "text" if "text" in names else names[0] if len(names) == 1 else None
    return values[name] if name and isinstance(values[name], str) else None


def _table_of_parquet(file: Path) -> pyarrow.Table:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            features = datasets.Features.from_arrow_schema(opened.schema_arrow)
            images = [name for name, feature in features.items() if _holds_encoded_images(feature)]
            if not images:
                raise UserError(
                    f"the shard {file} has no column of encoded images (its columns are {', '.join(features)}); "
                    "leave --streaming out, or write the images into the Parquet files"
                )
            sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            _require_small_groups(file, opened.metadata)
            table = opened.read(columns=[name for name in features if name not in images])
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"the shard {file} cannot be read ({one_line(error, 200)}); it is damaged or incomplete: download or make "
            "it again"
        ) from None
    table = table.replace_schema_metadata(None)
    for name in images:
        places = [
            {"bytes": None, "path": place_in_parquet(str(file), name, group, row)}
            for group, size in enumerate(sizes)
            for row in range(size)
        ]
        column = "image" if len(images) == 1 and "image" not in features else name
        table = table.append_column(column, pyarrow.array(places, datasets.Image().pa_type))
    captions = caption_columns(table.column_names)
    if "text" not in table.column_names and len(captions) == 1:
        table = table.append_column("text", table.column(captions[0]))
    blocks = [group for group, size in enumerate(sizes) for _ in range(size)]
    table = table.append_column(BLOCK_COLUMN, pyarrow.array(blocks, pyarrow.int32()))
    kept = {name: feature for name, feature in features.items() if name not in images}
    placed = {
        name: datasets.Image()
        for name in table.column_names
        if table.schema.field(name).type == datasets.Image().pa_type
    }
    return _typed(table, kept | placed)


def _holds_encoded_images(feature: Any) -> bool:
    """Return whether a column has images or bytes, and not texts, which may be paths."""
    return may_hold_images(feature) and "string" not in str(getattr(feature, "dtype", ""))


def _require_small_groups(file: Path, metadata: Any) -> None:
    """Raise UserError for row groups that do not fit into memory as a whole, as they are decoded."""
    largest = max((metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)), default=0)
    if largest > MOST_BYTES_OF_GROUP:
        raise UserError(
            f"the shard {file} has a row group of {largest / 2**30:.1f} GiB, which has to be decoded as a whole to "
            "read one image; write it again with smaller ones, such as write_table(…, row_group_size=100)"
        )


def _typed(table: pyarrow.Table, features: Mapping[str, Any]) -> pyarrow.Table:
    """Return the table with the types of `datasets` in its schema."""
    import datasets

    known = datasets.Features.from_arrow_schema(table.schema.remove_metadata())
    return table.cast(datasets.Features(known | dict(features)).arrow_schema)
