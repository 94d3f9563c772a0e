"""Data in shards, opened without unpacking or copying an image (`--streaming true`).

The rows of each shard are written once into the cache of `datasets` as a small table, which has captions and classes,
and the place of each image in its shard. Those tables are mapped, not loaded; the images are read from the shards. So
the data are opened like any other source, and every row can be read by its number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from pipelines.tools.cli import UserError
from pipelines.tools.files import image_suffixes
from training.core.blocks import RowBlocks
from training.core.files import write_atomically
from training.data.folder_layout import SPLIT_NAMES
from training.data.records import cache_file, files_state, remote_files_state
from training.data.shards.places import shard_of
from training.data.shards.remote import HUB
from training.data.shards.sources import REQUESTS_AT_ONCE, SUFFIXES, RemoteShard, remote_shards
from training.data.shards.tables import BLOCK_COLUMN, BLOCK_ROWS, table_of_shard
from training.data.shards.threads import map_in_threads

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, DatasetDict

_VERSION = 1
"""Increased whenever the same shards may become other rows than before."""
_ROWS_PER_WRITE = 10_000


def open_shards(path: Path, files: Sequence[Path]) -> DatasetDict:
    """Open shards of WebDataset or of Parquet.

    Args:
        path: a folder of shards, or a shard.
        files: the files, if `path` is a pattern.

    Raises:
        UserError: the source has no shards, or one that is damaged.
    """
    root = Path(os.path.abspath(path))
    shards = sorted(Path(os.path.abspath(file)) for file in files) or _shards_below(root)
    splits: dict[str, list[Path | RemoteShard]] = {}
    for shard in shards:
        below = shard.relative_to(root if root.is_dir() else shard.parent).with_suffix("").as_posix()
        splits.setdefault(_split_of(below), []).append(shard)
    return _opened(splits)


def open_remote_shards(name: str, config_name: str | None, commit: str) -> tuple[DatasetDict, str]:
    """Open shards that lie elsewhere (see `sources`), of which the images are received when they are read.

    Args:
        config_name: configuration of a dataset on the Hub, if it has several.
        commit: commit of a dataset on the Hub (see `sources.commit_of`); not used for other sources.

    Returns:
        The splits, and a state that changes with the content of the shards.

    Raises:
        UserError: shards are missing, damaged or cannot be read.
    """
    shards = remote_shards(name, config_name, commit)
    urls = [str(shard).split("/") for shard in shards]
    above = len(os.path.commonprefix([folders for *folders, _ in urls]))
    splits: dict[str, list[Path | RemoteShard]] = {}
    for url, shard in zip(urls, shards, strict=True):
        split = shard.split or _split_of("/".join(url[above:]).rpartition(".")[0])
        splits.setdefault(split, []).append(shard)
    return _opened(splits), remote_files_state([_state_of(shard) for shard in shards])


def _opened(splits: Mapping[str, Sequence[Path | RemoteShard]]) -> DatasetDict:
    import datasets

    return datasets.DatasetDict(
        {name: datasets.Dataset.from_file(str(_table(splits[name]))) for name in sorted(splits, key=_place_of_split)}
    )


def row_blocks(dataset: Dataset, window: int) -> RowBlocks | None:
    """Return the blocks of rows of streamed data, or of a selection of their rows in order; None for other data.

    Args:
        window: number of rows that are shuffled together.
    """
    if BLOCK_COLUMN not in dataset.column_names:
        return None
    blocks = dataset.data.column(BLOCK_COLUMN).to_numpy()
    if dataset._indices is not None:  # `datasets` stores a selection of rows here
        blocks = blocks[dataset._indices.column(0).to_numpy()]
    starts = np.flatnonzero(np.diff(blocks, prepend=-1, append=-1))
    return RowBlocks(torch.from_numpy(starts.astype(np.int64)), window)


def block_order(dataset: Dataset, generator: np.random.Generator) -> np.ndarray | None:
    """Return all rows with their blocks in a random order; None for data that are not streamed."""
    blocks = row_blocks(dataset, 1)
    if blocks is None:
        return None
    spans = blocks.starts.unfold(0, 2, 1)[generator.permutation(len(blocks.starts) - 1)].tolist()
    return np.concatenate([np.arange(start, stop) for start, stop in spans])


def _shards_below(path: Path) -> list[Path]:
    if path.is_file():
        shards = [path] if path.suffix.lower() in SUFFIXES else []
    else:
        found = [Path(folder, name) for folder, _, names in os.walk(path) for name in names if name[0] not in "._"]
        # img2dataset writes a table of each tar file beside it.
        of_kinds = ([file for file in found if file.suffix.lower() == suffix] for suffix in SUFFIXES)
        shards = next((sorted(kind) for kind in of_kinds if kind), [])
    if not shards:
        raise UserError(
            f"--streaming true reads shards (tar files of WebDataset, or Parquet files), and {path} has none; leave "
            "the flag out for folders of images, other archives and other tables"
        )
    return shards


def _split_of(path: str) -> str:
    """Return the split whose name is a word of the path of a shard, without its suffix; "train" without one."""
    words = re.split(r"[^a-z]+", path.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")


def _place_of_split(name: str) -> tuple[int, str]:
    usual = list(dict.fromkeys(SPLIT_NAMES.values()))
    return usual.index(name) if name in usual else len(usual), name


def _state_of(shard: RemoteShard) -> tuple[str, int, str]:
    return shard.url, shard.size, shard.version


def _content_of(shard: Path | RemoteShard) -> Any:
    """Return what the table of a shard is made again for. A shard on the Hub keeps it in later commits."""
    if not isinstance(shard, RemoteShard):
        return files_state(shard)
    return [shard.size, shard.version] if shard.url.startswith(HUB) else _state_of(shard)


def _at_its_url(table: pyarrow.Table, shard: Path | RemoteShard) -> pyarrow.Table:
    """Return the table of a shard on the Hub, which may have been made at an earlier commit, with places at its URL."""
    import datasets
    import pyarrow.compute

    if not isinstance(shard, RemoteShard) or not shard.url.startswith(HUB):
        return table
    for number, (name, feature) in enumerate(datasets.Features.from_arrow_schema(table.schema).items()):
        if isinstance(feature, datasets.Image):
            images = table.column(name).combine_chunks()
            paths = images.field("path").drop_null()
            made_at = shard_of(paths[0].as_py()) if len(paths) else None
            if made_at not in (None, shard.url):
                moved = pyarrow.compute.replace_substring(images.field("path"), made_at, shard.url, max_replacements=1)
                images = pyarrow.compute.make_struct(images.field("bytes"), moved, field_names=["bytes", "path"])
                images = images.cast(table.schema.field(number).type)
                table = table.set_column(number, table.schema.field(number), images)
    return table


def _table(shards: Sequence[Path | RemoteShard]) -> Path:
    """Return the file with the rows of several shards, which is made if a shard has changed since."""
    key = [_VERSION, BLOCK_ROWS, sorted(image_suffixes())]
    states = [_state_of(shard) if isinstance(shard, RemoteShard) else files_state(shard) for shard in shards]
    joined = cache_file("shards", [key, states], ".arrow")
    if joined.is_file():
        return joined
    parts = [cache_file("shard", [key, _content_of(shard)], ".arrow") for shard in shards]
    joined.parent.mkdir(parents=True, exist_ok=True)

    def index(number: int) -> None:
        if not parts[number].is_file():
            _write(parts[number], [table_of_shard(shards[number])])

    # The threads of remote shards wait for the network.
    remote = any(isinstance(shard, RemoteShard) for shard in shards)
    threads = REQUESTS_AT_ONCE if remote else min(16, 2 * (os.cpu_count() or 1))
    map_in_threads(index, range(len(shards)), threads, "index of the shards")
    _write(joined, _numbered([_at_its_url(_read(part), shard) for part, shard in zip(parts, shards, strict=True)]))
    return joined


def _numbered(tables: Sequence[pyarrow.Table]) -> list[pyarrow.Table]:
    """Return tables with the same columns, and blocks that are numbered over all of them."""
    import datasets
    import pyarrow
    import pyarrow.compute

    first, numbered = 0, []
    for table in tables:
        blocks = pyarrow.compute.add(table.column(BLOCK_COLUMN), pyarrow.scalar(first, pyarrow.int32()))
        numbered.append(table.set_column(table.column_names.index(BLOCK_COLUMN), BLOCK_COLUMN, blocks))
        first = blocks[-1].as_py() + 1 if len(blocks) else first
    try:
        joined = pyarrow.concat_tables(
            [table.replace_schema_metadata(None) for table in numbered], promote_options="permissive"
        )
    except pyarrow.ArrowException as error:
        raise UserError(f"the shards have columns of different types ({error}); give shards of one dataset") from None
    known: dict[str, Any] = {}
    for table in numbered:
        known |= datasets.Features.from_arrow_schema(table.schema)
    features = datasets.Features.from_arrow_schema(joined.schema)
    typed = {name: known[name] for name in features if isinstance(known[name], datasets.Image | datasets.ClassLabel)}
    return [joined.cast(datasets.Features(features | typed).arrow_schema)]


def _read(file: Path) -> pyarrow.Table:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()


def _write(file: Path, tables: Sequence[pyarrow.Table]) -> None:
    """Write tables as `datasets` writes those in its cache."""
    import pyarrow

    def stream(opened: IO[bytes]) -> None:
        with pyarrow.ipc.new_stream(opened, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table, max_chunksize=_ROWS_PER_WRITE)

    write_atomically(file, stream)
