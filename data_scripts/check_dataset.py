"""Check every row of a dataset before training: broken images, empty captions, invalid labels, mismatched masks.

    python data_scripts/check_dataset.py --dataset_name DATA

The output begins with an account of every file of a folder of images: what is read, and what is left out. All problems
are then listed by row in one pass, and the exit status is 2 if there are any. Duplicates and near-duplicates (copies in
another size or compression, mirrored, or slightly cropped) are reported, but do not count as problems.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from data_scripts.duplicates.groups import describe, groups_of, write_groups
from data_scripts.duplicates.prints import Place, Print, Prints, verified_print
from data_scripts.duplicates.search import comparisons, near_duplicates
from pipelines.tools.cli import USER_ERROR_STATUS, UserError, entry_point, printable
from pipelines.tools.progress import Progress
from training.core.options import option
from training.core.parsing import parse_config
from training.data.checks import Problem, chunks, decoding, verify_reason
from training.data.fingerprints import encoded_bytes
from training.data.images import (
    DataConfig,
    ImageDataset,
    LabelMap,
    load_all_splits,
    load_label_map,
)
from training.data.source import folder_account, load_split, named_split, require_column, row_id, undecoded_images
from training.data.transforms import BrokenImage, load_rgb

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_CLASSES_SHOWN = 12
_DUPLICATES_SHOWN = 5


@dataclass
class CheckConfig(DataConfig):
    """Flags of this script."""

    splits: list[str] = field(default_factory=list)
    """Splits to check, e.g. '[train,test]'; an empty list checks all of them"""
    max_listed: int = 1000
    """Maximum number of problems to list; 0 lists all"""
    near_duplicate_distance: int = option(12, at_least=0, at_most=32)
    """Largest number of different bits, of 64, between the hashes of images that are compared as possible
    near-duplicates; 0 does not search for near-duplicates"""
    near_duplicates_dir: str | None = None
    """Folder to write all groups of near-duplicates to, as a list and as an image that shows them"""
    seed: int = 0
    """--seed of the training runs: it chooses the held-out rows if the data has no validation split"""

    def validate(self, prefix: str = "") -> None:
        """Raise UserError for values that are invalid for every dataset."""
        super().validate(prefix)
        if self.max_listed < 0:
            raise UserError(f"max_listed is {self.max_listed}; --max_listed must be at least 0")


@dataclass
class SplitReport:
    """The contents and the problems of one split."""

    name: str
    rows: int
    problems: list[Problem] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of each readable image"""
    caption_words: list[int] = field(default_factory=list)
    captions: set[int] = field(default_factory=set)
    """Hashes of the distinct captions"""
    labels: Counter = field(default_factory=Counter)
    first_row: dict[bytes, int] = field(default_factory=dict)
    """Digest of an image file → the first row that contains it"""
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    """(row, first row with the same image)"""


def main(argv: Sequence[str] | None = None) -> int | None:
    config = parse_config(CheckConfig, argv, description=__doc__)
    splits = load_all_splits(config)
    account = folder_account(config)
    for line in account.lines() if account else ():
        print(printable(line))
    columns = splits[next(iter(splits))].column_names
    label_map = _label_map(config, columns)
    reports, prints = [], Prints()
    held_out = _held_out_rows(config, splits)
    for name in config.splits or list(splits):
        dataset = named_split(config, splits, name)
        reports.append(
            check_split(name, dataset, config, label_map, prints, held_out if name == config.train_split else set())
        )
    print(printable(summary(reports, config, label_map)))
    if config.near_duplicate_distance:
        print(printable(_near_duplicates(config, splits, prints)))
    problems = [(report.name, problem) for report in reports for problem in report.problems]
    if not problems:
        left_out = account.images_left_out if account else 0
        print(
            f"Every row can be trained on. Files left out (listed above): {left_out:,}."
            if left_out
            else "No problems: every row can be trained on."
        )
        return 0
    print(f"\n{len(problems):,} problems:")
    for name, problem in problems[: config.max_listed or None]:
        print(f"  {name} {printable(problem)}")
    if config.max_listed and len(problems) > config.max_listed:
        print(f"  and {len(problems) - config.max_listed:,} more (--max_listed 0 lists all)")
    print("Fix or remove these rows, or skip them during training with --on_bad_sample skip")
    return USER_ERROR_STATUS


def check_split(
    name: str,
    dataset: Dataset,
    config: CheckConfig,
    label_map: LabelMap | None,
    prints: Prints,
    held_out: Container[int] = (),
) -> SplitReport:
    """Check every row of a split once and return the report; the prints of intact images are added to `prints`.

    Args:
        held_out: rows of the split that training holds out for validation.
    """
    captions = config.caption_column in dataset.column_names or config.caption_column != DataConfig().caption_column
    images = ImageDataset(
        dataset, config, captions=captions, labels=label_map is not None, label_map=label_map, augment=False
    )
    companions = _companions(dataset, config)
    columns = [*images.dataset.column_names, *companions]
    table = undecoded_images(dataset.select_columns(columns), config.image_column, "image_column", config)
    for column, flag in companions.items():
        table = undecoded_images(table, column, flag, config)
    report = SplitReport(name, len(dataset))
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(len(dataset), "row", name) as progress:
        for rows, values in chunks(table, range(len(dataset))):
            results = {column: list(pool.map(verify_reason, values[column])) for column in companions}
            printing = _printed if config.near_duplicate_distance else _not_printed
            printed = list(pool.map(printing, values[config.image_column]))
            results[config.image_column] = [(size, reason) for size, reason, _ in printed]
            digests = list(pool.map(_digest, values[config.image_column]))
            for i, row in enumerate(rows):
                record = {column: column_values[i] for column, column_values in values.items()}
                _check_images(report, images, row, {column: checked[i] for column, checked in results.items()})
                _check_texts(report, images, row, record)
                _count_duplicate(report, row, digests[i])
                if (one := printed[i][2]) is not None:
                    part = f"the held-out rows of {name}" if row in held_out else name
                    prints.add(Place(name, row, part), digests[i], one)
            progress.update(len(rows))
    return report


def _companions(dataset: Dataset, config: CheckConfig) -> dict[str, str]:
    """Return the columns of masks and control images that the dataset has, each with the flag that names it."""
    controls = config.conditioning_image_column
    names = [(config.mask_column, "mask_column")]
    names += [(name, "conditioning_image_column") for name in ([controls] if isinstance(controls, str) else controls)]
    present = {}
    for name, flag in names:
        if name not in dataset.column_names and name == getattr(DataConfig(), flag):
            continue
        require_column(dataset, name, flag)
        present[name] = flag
    return present


def _label_map(config: CheckConfig, columns: Sequence[str]) -> LabelMap | None:
    if config.label_column not in columns and config.label_column == DataConfig().label_column:
        return None
    return load_label_map(config)


def _check_images(
    report: SplitReport, images: ImageDataset, row: int, results: dict[str, tuple[tuple[int, int] | None, str | None]]
) -> None:
    size, _ = results[images.config.image_column]
    if size is not None:
        report.sizes.append(size)
    for column, (other, reason) in results.items():
        if reason is None and size is not None and other != size:
            reason = f"its size is {_times(other)}, but its image is {_times(size)}"
        if reason is not None:
            report.problems.append(Problem(row, images.where(row), column, reason))


def _check_texts(report: SplitReport, images: ImageDataset, row: int, record: dict[str, Any]) -> None:
    problems = images.quick_problems(record)
    report.problems += [Problem(row, images.where(row), problem.column, str(problem)) for problem in problems]
    bad = {problem.column for problem in problems}
    if images.captions and images.config.caption_column not in bad:
        captions = record[images.config.caption_column]
        for caption in captions if isinstance(captions, list) else [captions]:
            report.caption_words.append(len(caption.split()))
            report.captions.add(hash(caption))
    if images.label_map is not None and images.config.label_column not in bad:
        report.labels[images.label_of(record)] += 1


def _count_duplicate(report: SplitReport, row: int, digest: bytes) -> None:
    first = report.first_row.setdefault(digest, row)
    if first != row:
        report.duplicates.append((row, first))


def _printed(source: Any) -> tuple[tuple[int, int] | None, str | None, Print | None]:
    """Return ((width, height), None, print) of an intact image, or (None, reason, None) for a broken one."""
    try:
        with decoding(source):
            size, one = verified_print(source)
    except BrokenImage as error:
        return None, str(error), None
    return size, None, one


def _not_printed(source: Any) -> tuple[tuple[int, int] | None, str | None, Print | None]:
    return *verify_reason(source), None


def _held_out_rows(config: CheckConfig, splits: DatasetDict) -> set[int]:
    """Return the rows of the training split that training holds out because the data has no validation split."""
    if config.validation_split in splits or config.train_split not in splits:
        return set()
    if config.validation_split != DataConfig().validation_split:  # it was named, but does not exist
        return set()
    held_out = load_split(config, "validation", config.seed)
    return {row_id(held_out, i) for i in range(len(held_out))}


def _near_duplicates(config: CheckConfig, splits: DatasetDict, prints: Prints) -> str:
    """Return the report on near-duplicates, and write the files that show them if `--near_duplicates_dir` asks."""
    with Progress(len(comparisons(len(prints.places))), "block", "near-duplicates") as progress:
        groups = groups_of(prints, near_duplicates(prints, config.near_duplicate_distance, progress.update))

    def source(place: Place) -> Any:
        table = splits[place.split].select_columns([config.image_column])
        return undecoded_images(table, config.image_column, "image_column", config)[place.row][config.image_column]

    def file_of(place: Place) -> str | None:
        path = source(place).get("path")
        return os.path.basename(path) if path else None

    def where(place: Place) -> str:
        file, held_out = file_of(place), ", held out" if place.part != place.split else ""
        return f"{place.split} row {place.row}{held_out}" + (f" ({file})" if file else "")

    lines = describe(prints, groups, where)
    if config.near_duplicates_dir and groups:
        written = write_groups(config.near_duplicates_dir, groups, lambda place: load_rgb(source(place)), file_of)
        lines.append(f"All groups: {written[0]}; the first ones to look at: {written[1]}")
    return "\n".join(lines)


def summary(reports: Sequence[SplitReport], config: CheckConfig, label_map: LabelMap | None) -> str:
    """Return a table of the splits, followed by remarks on small, non-square and duplicate images and on classes."""
    lines: list[tuple[str, ...]] = [
        (
            "split",
            "rows",
            "problems",
            "smallest image",
            "median",
            "largest",
            "words per caption",
            "captions",
            "duplicates",
        )
    ]
    for report in reports:
        ordered = sorted(report.sizes, key=lambda size: size[0] * size[1])
        sizes = [_times(ordered[i]) for i in (0, len(ordered) // 2, -1)] if ordered else ["-"] * 3
        words = report.caption_words
        span = f"{min(words)} to {max(words)}, median {int(np.median(words))}" if words else "-"
        counts = (f"{report.rows:,}", f"{len(report.problems):,}")
        tail = (span, f"{len(report.captions):,} distinct" if words else "none", f"{len(report.duplicates):,}")
        lines.append((report.name, *counts, *sizes, *tail))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    for report in reports:
        text += _remarks(report, config, label_map)
    return "\n".join(["", *text, *_shared_images(reports)])


def _remarks(report: SplitReport, config: CheckConfig, label_map: LabelMap | None) -> Iterable[str]:
    small = sum(min(size) < config.resolution for size in report.sizes)
    if small:
        yield f"{report.name}: {small:,} images are below {config.resolution} px (--resolution) and will be enlarged."
    uneven = sum(width != height for width, height in report.sizes)
    if uneven and not config.aspect_buckets:
        done = "they will be padded" if config.pad_to_square else "their longer side will be cropped (--center_crop)"
        yield f"{report.name}: {uneven:,} images are not square; {done}."
    if report.duplicates:
        pairs = ", ".join(f"{row} = {first}" for row, first in report.duplicates[:_DUPLICATES_SHOWN])
        more = ", …" if len(report.duplicates) > _DUPLICATES_SHOWN else ""
        yield f"{report.name}: {len(report.duplicates):,} images occur more than once: rows {pairs}{more}"
    if label_map is not None:
        shown = [f"{label_map.names[label]} {count:,}" for label, count in report.labels.most_common(_CLASSES_SHOWN)]
        hidden = len(report.labels) - len(shown)
        empty = len(label_map) - len(report.labels)
        yield (
            f"{report.name}: {len(report.labels):,} classes: {', '.join(shown)}"
            + (f" and {hidden:,} more" if hidden else "")
            + (f"; {empty:,} classes of the training split are missing" if empty else "")
        )


def _shared_images(reports: Sequence[SplitReport]) -> list[str]:
    lines = []
    for i, one in enumerate(reports):
        for other in reports[i + 1 :]:
            shared = [
                (one.first_row[digest], row) for digest, row in other.first_row.items() if digest in one.first_row
            ]
            if shared:
                pairs = ", ".join(f"{a} = {b}" for a, b in shared[:_DUPLICATES_SHOWN])
                lines.append(
                    f"{len(shared):,} images are in both {one.name} and {other.name} (rows {pairs}): "
                    f"metrics on {other.name} will be too optimistic."
                )
    return lines


def _digest(source: Any) -> bytes:
    return hashlib.sha256(encoded_bytes(source)).digest()


def _times(size: tuple[int, int] | None) -> str:
    return f"{size[0]}×{size[1]}" if size else "-"


if __name__ == "__main__":
    entry_point(main)
