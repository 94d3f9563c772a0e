"""Write rows as Parquet shards that `datasets.load_dataset` reads, with a dataset card.

Several processes make the rows, but they are written in a fixed order, so the bytes depend only on the options.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_scripts.posters.records import COLUMNS, PARTS, PosterOptions, Row, make_row
from pipelines.common.poster_domain import GRAMMAR, STYLES
from pipelines.tools.progress import watched

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
ROWS_PER_SHARD = 5_000
ROWS_PER_GROUP = 500
"""Number of rows held in memory before they are written; fixed, because the bytes of the file depend on it."""

IMAGE_COLUMNS = ("image", "text_mask", "image_mask", "color_role", "hierarchy")


def split_indices(num_posters: int, sizes: dict[str, int], seed: int) -> dict[str, list[int]]:
    """Return the poster numbers of each split: a permutation seeded by `seed`, divided by `sizes`, each part sorted."""
    order = np.random.default_rng([seed, num_posters]).permutation(num_posters)
    parts, start = {}, 0
    for split in SPLITS:
        parts[split] = sorted(int(index) for index in order[start : start + sizes[split]])
        start += sizes[split]
    return parts


def dataset_features() -> datasets.Features:
    """Return the types of the columns for the `datasets` library."""
    from datasets import ClassLabel, Features, Image, Value

    box = {name: Value("float32") for name in ("hierarchy", "x0", "y0", "x1", "y1")}
    features: dict[str, Any] = {name: Value("string") for name in COLUMNS}
    features |= {name: Image() for name in IMAGE_COLUMNS}
    features |= {name: Value("float32") for name in ("energy", "formality", "warmth", *GRAMMAR)}
    features |= {name: Value("int32") for name in ("text_blocks", "pictures")}
    features |= {name: [Value("string")] for name in ("palette", "palette_names")}
    features["index"] = Value("int64")
    features["label"] = ClassLabel(names=list(STYLES))
    features["elements"] = [{"kind": Value("string"), "role": Value("string"), **box}]
    return Features(features)


def write_dataset(folder: Path, options: PosterOptions, parts: dict[str, list[int]], num_workers: int) -> None:
    """Make the posters of every split and write them to `folder`/data/<split>-<shard>-of-<shards>.parquet."""
    import pyarrow.parquet

    schema = dataset_features().arrow_schema
    (folder / "data").mkdir(parents=True)
    total = sum(len(indices) for indices in parts.values())
    shards = list(_shards(folder, parts))
    indices = [index for _, shard in shards for index in shard]
    with _rows(options, indices, num_workers) as rows:
        progress = watched(rows, total, "poster", "posters")
        for path, shard in shards:
            with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
                for start in range(0, len(shard), ROWS_PER_GROUP):
                    group = list(islice(progress, min(ROWS_PER_GROUP, len(shard) - start)))
                    writer.write_table(pyarrow.Table.from_pylist(group, schema=schema), row_group_size=ROWS_PER_GROUP)
        for _ in progress:  # exhausts the progress bar, so that it closes
            pass


def _shards(folder: Path, parts: dict[str, list[int]]) -> Iterator[tuple[Path, list[int]]]:
    for split, indices in parts.items():
        count = -(-len(indices) // ROWS_PER_SHARD)
        for number in range(count):
            name = f"{split}-{number:05d}-of-{count:05d}.parquet"
            yield folder / "data" / name, indices[number * ROWS_PER_SHARD : (number + 1) * ROWS_PER_SHARD]


@contextmanager
def _rows(options: PosterOptions, indices: list[int], num_workers: int) -> Iterator[Iterable[Row]]:
    """Yield an iterable over the rows of `indices` in order, made by `num_workers` processes (1: this process)."""
    make = partial(make_row, options)
    if num_workers == 1:
        yield map(make, indices)
        return
    # New interpreters instead of forks: a fork of a process with threads (those of pyarrow) can hang.
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        yield pool.imap(make, indices, chunksize=16)


def write_card(folder: Path, settings: dict[str, Any], parts: dict[str, list[int]]) -> None:
    """Write README.md: the files of the splits (for `load_dataset`) and the meanings of the columns."""
    used = [split for split in SPLITS if parts[split]]
    data_files = "".join(f"  - split: {split}\n    path: data/{split}-*.parquet\n" for split in used)
    counts = ", ".join(f"{split} {len(parts[split]):,}" for split in used)
    columns = "".join(f"| `{name}` | {meaning} | {PARTS.get(name, '')} |\n" for name, meaning in COLUMNS.items())
    made_from = "".join(f"- {name}: {value}\n" for name, value in settings.items())
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{data_files}---\n\n# Posters\n\n"
        f"Posters made by a program (`data_scripts/make_posters.py`), each with its brief, its feature maps and "
        f"the boxes of its elements.\n\nSplits: {counts}.\n\n```python\nfrom datasets import load_dataset\n\n"
        f'posters = load_dataset("path/to/this/folder")\n```\n\n| column | meaning | part |\n|---|---|---|\n{columns}\n'
        "The last column is the name used in Halftone's documentation: P_Image is the poster, F_Tensor its feature "
        "maps, V_Meta the values of its brief, and V_Grammar the measures of its layout.\n\n"
        f"Made with:\n\n{made_from}\n![posters with their masks](contact_sheet.png)\n",
        encoding="utf-8",
    )
