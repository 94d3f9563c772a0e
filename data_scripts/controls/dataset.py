"""Write a dataset with added control images as Parquet shards with a card, a few rows at a time."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from pipelines.tools.cli import UserError
from pipelines.tools.commands import command
from pipelines.tools.progress import Progress
from training.data.checks import decoding
from training.data.transforms import BrokenImage, load_rgb

if TYPE_CHECKING:
    from datasets import Dataset, Features

CHECK = command("data_scripts/check_dataset.py")
ROWS_AT_ONCE = 100
"""Number of rows held in memory, and of rows per row group of the files"""
ROWS_PER_SHARD, BYTES_PER_SHARD = 5_000, 500_000_000

Draw = Callable[[Image.Image], list[Image.Image]]
"""Function from an image to its controls, one for each new column"""


class ControlWriter:
    """Writes splits with their controls.

    Args:
        folder: the dataset's folder; shards are written to `data/<split>-<shard>.parquet` in it.
        image_column: column with the images.
        columns: names of the new columns.
        draw: function that draws the controls of an image; it is called on the threads of `pool`.
        resolution: larger images are reduced first, so that their shorter side has this many pixels; None keeps all.
        skip_broken: skip rows with broken images instead of raising.
    """

    def __init__(
        self,
        folder: Path,
        image_column: str,
        columns: Sequence[str],
        draw: Draw,
        pool: ThreadPoolExecutor,
        *,
        resolution: int | None = None,
        skip_broken: bool,
    ):
        self.resolution = resolution
        self.folder, self.image_column, self.columns = folder / "data", image_column, list(columns)
        self.draw, self.pool, self.skip_broken = draw, pool, skip_broken
        self.folder.mkdir(exist_ok=True)

    def write(self, name: str, split: Dataset) -> int:
        """Write a split whose images are undecoded, and return the number of rows written.

        Raises:
            UserError: an image is broken (the message names its row), or all images are broken.
        """
        features, shard, written = self.features(split), 0, 0
        with Progress(len(split), "image", name) as progress:
            while progress.done < len(split):
                path = self.folder / f"{name}-{shard:05d}.parquet"
                written += self._write_shard(path, split, progress, features)
                shard += 1
        if not written:
            raise UserError(f"all images of split '{name}' are broken; run {CHECK} to list the reasons")
        return written

    def features(self, split: Dataset) -> Features:
        """Return the types of the source's columns and of the new columns."""
        import datasets

        images = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
        return datasets.Features({**split.features, **{name: datasets.Image() for name in (*images, *self.columns)}})

    def _write_shard(self, path: Path, split: Dataset, progress: Progress, features: Features) -> int:
        """Write rows from the position of `progress` on, until there are no more rows or the file is large enough."""
        import pyarrow.parquet

        written, first = 0, progress.done
        with pyarrow.parquet.ParquetWriter(path, features.arrow_schema, compression="zstd") as writer:
            while progress.done == first or (
                progress.done < len(split) and written < ROWS_PER_SHARD and path.stat().st_size < BYTES_PER_SHARD
            ):
                rows = range(progress.done, min(progress.done + ROWS_AT_ONCE, len(split)))
                table = self._with_controls(split, rows, features)
                try:
                    writer.write_table(table)
                except OSError as error:
                    raise UserError(
                        f"--output_dir: {path.name} cannot be written ({error.strerror or error}); choose "
                        "a folder with enough free space"
                    ) from error
                written += len(table)
                progress.update(len(rows))
        return written

    def _with_controls(self, split: Dataset, rows: range, features: Features) -> Any:
        """Return these rows as a pyarrow table that contains the bytes of all images."""
        import datasets
        import pyarrow

        stored = split.with_format("arrow")[rows.start : rows.stop]
        sources = stored[self.image_column].to_pylist()
        drawn = list(self.pool.map(functools.partial(_drawn_or_problem, self.draw, self.resolution), sources))
        problems = {row: result for row, result in zip(rows, drawn, strict=True) if isinstance(result, str)}
        if problems and not self.skip_broken:
            row, reason = next(iter(problems.items()))
            raise UserError(
                f"row {row} of the dataset: {reason}; fix or remove it ({CHECK} lists all such "
                "rows), or skip it with --on_bad_sample skip"
            )
        if problems:
            stored = stored.filter(pyarrow.array([row not in problems for row in rows]))
        kept = [result for result in drawn if not isinstance(result, str)]
        if any(result.reduced for result in kept):
            sources = stored[self.image_column].to_pylist()
            smaller = [_stored(result.reduced) if result.reduced else source for result, source in zip(kept, sources)]
            column = pyarrow.array(smaller, type=datasets.Image().pa_type)
            stored = stored.set_column(stored.column_names.index(self.image_column), self.image_column, column)
        for number, name in enumerate(self.columns):
            values = [_stored(result.controls[number]) for result in kept]
            stored = stored.append_column(name, pyarrow.array(values, type=datasets.Image().pa_type))
        table = datasets.table.table_cast(stored, features.arrow_schema)
        # Images that are still separate files (imagefolder) are read into the table; no other files are.
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        embedded = datasets.table.embed_table_storage(table.select(images))
        for name in images:
            table = table.set_column(table.column_names.index(name), table.field(name), embedded[name])
        return table


class _Drawn(NamedTuple):
    """The controls of an image, and the image itself if it was reduced, as PNG files."""

    controls: list[bytes]
    reduced: bytes | None


def _stored(file: bytes) -> dict[str, Any]:
    return {"bytes": file, "path": None}


def _drawn_or_problem(draw: Draw, resolution: int | None, source: Any) -> _Drawn | str:
    """Return the controls of an image, or the reason why the image is broken."""
    try:
        with decoding(source):
            image = load_rgb(source)
            smaller = reduced(image, resolution)
            controls = [_png(control) for control in draw(smaller)]
            return _Drawn(controls, None if smaller is image else _png(smaller))
    except BrokenImage as error:
        return str(error)


def reduced(image: Image.Image, resolution: int | None) -> Image.Image:
    """Return the image with a shorter side of at most `resolution` pixels."""
    shorter = min(image.size)
    if resolution is None or shorter <= resolution:
        return image
    width, height = (max(resolution, round(side * resolution / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_card(
    folder: Path, source: str, counts: Mapping[str, int], columns: Mapping[str, str], settings: Mapping[str, Any]
) -> None:
    """Write README.md: the files of the splits (for `load_dataset`), the new columns, and how they were made.

    Args:
        folder: the folder to write to.
        source: name of the original dataset.
        counts: number of rows in each split.
        columns: description of each new column.
        settings: the settings that the controls were made with.
    """
    data_files = "".join(f"  - split: {name}\n    path: data/{name}-*.parquet\n" for name in counts)
    splits = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    table = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in columns.items())
    made_with = "".join(f"- {name}: {value}\n" for name, value in settings.items())
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{data_files}---\n\n# Controls for {source}\n\n"
        f"All rows and columns of {source}, with control images that `data_scripts/make_controls.py` of Halftone drew "
        f"from its images, in the same sizes. The licence of {source} applies here too.\n\n"
        f"Splits: {splits}.\n\n| new column | shows |\n|---|---|\n{table}\nMade with:\n\n{made_with}\n"
        "![images beside their controls](contact_sheet.png)\n",
        encoding="utf-8",
    )
