"""The rows of one shard as a table: captions and classes by value, images by their place in the shard."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from pipelines.tools.cli import UserError, one_line
from pipelines.tools.files import image_suffixes
from training.data.caption_tables import caption_columns
from training.data.column_types import may_hold_images
from training.data.folder_layout import CAPTION_SUFFIXES
from training.data.shards.places import open_parquet, place_in_parquet, place_in_tar
from training.data.shards.sources import RemoteShard, suffix_of

if TYPE_CHECKING:
    import pyarrow

BLOCK_COLUMN = "__block__"
"""Column with the number of the block of rows within the shard. The rows of a block are read one after another."""
# Number of images in a row of a tar file that are a block: few enough to mix shards, and enough to read at once.
BLOCK_ROWS = 256
MOST_BYTES_OF_GROUP = 2**30
_MOST_BYTES_OF_TEXT = 2**20
# Of a remote tar file, a block is received as a whole unless it is much larger than its images: with a header of 512
# bytes and the rest of 512 bytes, an image and its caption and class have up to this many bytes beside them.
_BESIDE_AN_IMAGE = 4096
_MOST_EXCESS = 2


class _Member(NamedTuple):
    """An image in a tar file."""

    name: str
    offset: int
    size: int


def table_of_shard(shard: Path | RemoteShard) -> pyarrow.Table:
    """Return the rows of a shard, after one pass over the headers of a tar file, or the small columns of a Parquet
    file.

    Raises:
        UserError: the shard is damaged or has no images, or is remote and cannot be read.
    """
    return _table_of_tar(shard) if suffix_of(str(shard)) == ".tar" else _table_of_parquet(shard)


def _table_of_tar(file: Path | RemoteShard) -> pyarrow.Table:
    """Return the rows of a shard of WebDataset: files of the same name up to its first dot are a sample."""
    import datasets
    import pyarrow

    samples: dict[str, dict[str, Any]] = {}
    try:
        # "r:" refuses compressed archives, in which no place can be read without all that is before it.
        with (
            _bytes_in(file) as content,
            tarfile.open(str(file), "r:", content, encoding="utf-8") as opened,
        ):
            for info in opened:
                name = PurePosixPath(info.name)
                if not info.isreg() or any(part.startswith((".", "__")) for part in name.parts):
                    continue
                stem, _, ending = name.name.partition(".")
                sample = samples.setdefault(str(name.parent / stem), {})
                _take(sample, opened, info, ending.lower())
            _require_end(content, opened.offset)
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise UserError(
            f"the shard {file} cannot be read ({one_line(error, 200)}); it is damaged or incomplete, or compressed: "
            "download or make it again, as a plain tar file"
        ) from None
    rows = [sample for sample in samples.values() if sample.get("image")]
    if not rows:
        raise UserError(f"the shard {file} has no images that can be read; remove it from the data")
    names = list(dict.fromkeys(name for row in rows for name in row))
    images = [name for name in names if name not in ("text", "label")]
    _put_places(rows, images, file)
    kinds = {name: pyarrow.string() if name in ("text", "label") else datasets.Image().pa_type for name in names}
    columns = {name: pyarrow.array([row.get(name) for row in rows], kinds[name]) for name in names}
    columns[BLOCK_COLUMN] = pyarrow.array([row // BLOCK_ROWS for row in range(len(rows))], pyarrow.int32())
    return _typed(pyarrow.table(columns), dict.fromkeys(images, datasets.Image()))


def _bytes_in(file: Path | RemoteShard) -> IO[bytes]:
    return cast("IO[bytes]", file.as_file()) if isinstance(file, RemoteShard) else file.open("rb")


def _put_places(rows: Sequence[dict[str, Any]], images: Sequence[str], file: Path | RemoteShard) -> None:
    """Put the places of images where their members are."""
    remote, shard = isinstance(file, RemoteShard), file.url if isinstance(file, RemoteShard) else str(file)
    for start in range(0, len(rows), BLOCK_ROWS):
        of_block = rows[start : start + BLOCK_ROWS]
        block = _bytes_of_block([row[name] for row in of_block for name in images if name in row]) if remote else None
        for row in of_block:
            for name in images:
                if name in row:
                    member: _Member = row[name]
                    place = place_in_tar(shard, member.name, member.offset, member.size, block)
                    row[name] = {"bytes": None, "path": place}


def _bytes_of_block(members: Sequence[_Member]) -> tuple[int, int] | None:
    """Return the first byte and the number of bytes of a block; None if most of them are not of its images."""
    start = min(member.offset for member in members)
    length = max(member.offset + member.size for member in members) - start
    own = sum(member.size + _BESIDE_AN_IMAGE for member in members)
    return (start, length) if length <= _MOST_EXCESS * own else None


def _require_end(content: IO[bytes], offset: int) -> None:
    """Raise ReadError unless the mark of the end of a tar file is at `offset`: `tarfile` takes damage for the end."""
    content.seek(offset)
    if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"there is neither a file nor the mark of the end at byte {offset:,}")


def _take(sample: dict[str, Any], opened: tarfile.TarFile, info: tarfile.TarInfo, ending: str) -> None:
    """Add a file of a sample: an image (jpg), another one (mask.png), a caption (txt or json) or a class (cls)."""
    column, _, kind = ending.rpartition(".")
    if f".{kind}" in image_suffixes():
        sample.setdefault(column or "image", _Member(info.name, info.offset_data, info.size))
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


def _table_of_parquet(file: Path | RemoteShard) -> pyarrow.Table:
    import datasets
    import pyarrow

    remote, shard = isinstance(file, RemoteShard), file.url if isinstance(file, RemoteShard) else str(file)
    try:
        with open_parquet(shard, file.size if isinstance(file, RemoteShard) else None) as opened:
            features = datasets.Features.from_arrow_schema(opened.schema_arrow)
            images = [name for name, feature in features.items() if _holds_encoded_images(feature)]
            if not images:
                raise UserError(
                    f"the shard {file} has no column of encoded images (its columns are {', '.join(features)}); "
                    "leave --streaming out, or write the images into the Parquet files"
                )
            sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            _require_small_groups(file, opened.metadata)
            bytes_of = {name: _bytes_of_groups(opened.metadata, name) if remote else None for name in images}
            table = opened.read(columns=[name for name in features if name not in images])
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"the shard {file} cannot be read ({one_line(error, 200)}); it is damaged or incomplete: download or make "
            "it again"
        ) from None
    table = table.replace_schema_metadata(None)
    for name in images:
        own = bytes_of[name]
        places = [
            {"bytes": None, "path": place_in_parquet(shard, name, group, row, None if own is None else own[group])}
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


def _bytes_of_groups(metadata: Any, column: str) -> list[int]:
    """Return the number of bytes that each row group has in a column, as they are stored."""
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    return [
        sum(
            group.column(i).total_compressed_size
            for i in range(group.num_columns)
            if f"{group.column(i).path_in_schema}.".startswith(f"{column}.")
        )
        for group in groups
    ]


def _require_small_groups(file: Path | RemoteShard, metadata: Any) -> None:
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
