"""Make control images for a ControlNet from the images of a dataset: edges, palettes, or layouts.

    python data_scripts/make_controls.py --train_data_dir my_images --kind edges --output_dir data/my_edges
    python data_scripts/make_controls.py --dataset_name data/a --kind '[soft_edges, palette]' --output_dir data/both
    python data_scripts/make_controls.py --dataset_name data/a --kind layout --encoder runs/encoder --output_dir data/b

The new dataset has all splits and columns of the original one, plus control images of the same sizes as its images. A
single kind of control is stored in the column `conditioning_image`; of several kinds, each is stored in a column named
after it. A layout is stored in two columns, `text_mask` and `image_mask`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_scripts.controls import kinds as control_kinds
from data_scripts.controls.dataset import ControlWriter, Draw, reduced, write_card
from data_scripts.controls.kinds import KINDS, LAYOUT_MASKS
from data_scripts.controls.sheet import sheet_of
from data_scripts.dataset_folder import check_replaceable, making, new_folder, write_manifest
from pipelines.tools.cli import UserError, entry_point, nearest
from pipelines.tools.commands import command
from training.core.options import Options, option
from training.core.parsing import parse_config
from training.data.fingerprints import evenly_spaced
from training.data.source import DataConfig, load_all_splits, require_column, undecoded_images
from training.data.transforms import BrokenImage, load_rgb

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from PIL.Image import Image

FORMAT_VERSION = 1
"""Increased whenever the same images and options would give different controls."""

SCRIPT = "make_controls.py"
SHEET_IMAGES = 24


@dataclass
class MakeControlsConfig(Options):
    """Flags of this script."""

    dataset_name: str | None = None
    """Dataset: a Hub id, or a local folder or file (imagefolder, Parquet, JSON, or written by save_to_disk)"""
    dataset_config_name: str | None = None
    """Configuration of the dataset, if it has several"""
    dataset_revision: str = "auto"
    """Commit, branch or tag of a Hub dataset; auto is the newest commit"""
    train_data_dir: str | None = None
    """Folder of images; replaces --dataset_name"""
    image_column: str = "image"
    """Column with the images"""
    output_dir: str = ""
    """Folder to write (required); it must be empty or not exist yet"""
    kind: list[str] | str = field(default_factory=list)
    """Kind of control (required): edges, soft_edges, palette or layout, or a list of kinds, e.g. '[edges,palette]'"""
    columns: list[str] = field(default_factory=list)
    """Names of all new columns, e.g. '[lines,colours]', to replace the default names"""
    resolution: int | None = option(None, at_least=8)
    """Reduce larger images first, so that their shorter side has this many pixels, and store them so; if unset, images
    keep their size"""
    sigma: float = option(0.7, at_least=0)
    """edges, soft_edges: standard deviation of the blur before edge detection, in pixels; more leaves fewer details"""
    low_threshold: float = 0.03
    """edges: minimum gradient of an edge, as a fraction of a step over the full range of a colour channel"""
    high_threshold: float = 0.1
    """edges: minimum gradient of a strong edge; weaker edges are kept only if they touch a strong one"""
    colors: int = 6
    """palette: maximum number of colours in an image"""
    cells: int = 8
    """palette: number of cells along the shorter side"""
    encoder: str | None = None
    """layout: encoder to use (required for this kind): run folder of train_encoder.py, checkpoint, pipeline folder
    or Hub id"""
    device: str | None = None
    """Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"""
    num_workers: int = 0
    """Number of threads that read and draw images; 0 uses one per CPU core"""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do with a broken image: stop and name its row, or skip the row"""
    overwrite: bool = False
    """Rename earlier controls in --output_dir (they are not deleted), and make new ones"""

    @property
    def kinds(self) -> list[str]:
        return [self.kind] if isinstance(self.kind, str) else list(self.kind)

    def validate(self, prefix: str = "") -> None:
        """Raise UserError for values that are invalid for every dataset."""
        super().validate(prefix)
        if not self.output_dir:
            raise UserError("--output_dir is missing; it is the folder to write")
        if not self.kinds:
            raise UserError(f"--kind is missing; give one or more of {', '.join(KINDS)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"--kind {kind} is none of {', '.join(KINDS)}{nearest(kind, KINDS)}")
        if len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"--kind lists a kind twice ({', '.join(self.kinds)}); list each kind once")
        if ("layout" in self.kinds) != bool(self.encoder):
            raise UserError(
                f"--encoder is {self.encoder}, but --kind has no layout; add layout to --kind, or leave out --encoder"
                if self.encoder
                else "--kind layout needs a layout encoder; name one with --encoder RUN (a run of train_encoder.py)"
            )
        default = self.default_columns
        if self.columns and (len(self.columns) != len(default) or len(set(self.columns)) < len(default)):
            raise UserError(f"--columns is {self.columns}; give one distinct name for each of: {', '.join(default)}")
        if not 0 <= self.low_threshold <= self.high_threshold <= 1:
            raise UserError(
                f"--low_threshold is {self.low_threshold} and --high_threshold is {self.high_threshold}; both must be "
                "in [0, 1], and the low one must not exceed the high one"
            )
        for name, least, most in (("colors", 1, 256), ("cells", 1, 4096), ("num_workers", 0, 1024)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be between {least} and {most}")

    @property
    def default_columns(self) -> list[str]:
        if len(self.kinds) == 1 and self.kinds != ["layout"]:
            return ["conditioning_image"]
        return [name for kind in self.kinds for name in (LAYOUT_MASKS if kind == "layout" else (kind,))]

    @property
    def new_columns(self) -> list[str]:
        return self.columns or self.default_columns

    @property
    def source(self) -> str:
        """Name of the dataset for messages and the card; for a local dataset, without its parent folders."""
        name = self.dataset_name or self.train_data_dir or ""
        return Path(name).expanduser().resolve().name if Path(name).expanduser().exists() else name

    def settings(self) -> dict[str, Any]:
        """Return the settings that the controls are made with."""
        of_kind = {
            "edges": ("sigma", "low_threshold", "high_threshold"),
            "soft_edges": ("sigma",),
            "palette": ("colors", "cells"),
            "layout": ("encoder",),
        }
        names = dict.fromkeys(name for kind in self.kinds for name in of_kind[kind])
        values = {name: getattr(self, name) for name in names}
        if self.encoder and Path(self.encoder).expanduser().exists():
            values["encoder"] = Path(self.encoder).name
        shared = {"made_by": SCRIPT, "format_version": FORMAT_VERSION, "source": self.source}
        if self.resolution is not None:
            shared["resolution"] = self.resolution
        return {**shared, "kinds": self.kinds, "columns": self.new_columns, **values}


def main(argv: Sequence[str] | None = None) -> int | None:
    config = parse_config(MakeControlsConfig, argv, description=__doc__)
    control_kinds.require_scikit_image(config.kinds)
    with making(Path(config.output_dir)) as folder:
        check_replaceable(folder, SCRIPT, "controls", config.overwrite)
        _make(config, folder)
    return 0


def _make(config: MakeControlsConfig, folder: Path) -> None:
    """Draw the controls and write them to `folder`."""
    splits = _open(config)
    draw = drawer(config)
    started = time.perf_counter()
    # A layout encoder uses all cores for one image already.
    workers = config.num_workers or (1 if config.encoder else os.cpu_count() or 1)
    skip = config.on_bad_sample == "skip"
    with new_folder(folder) as (partial, aside), ThreadPoolExecutor(workers) as pool:
        writer = ControlWriter(
            partial,
            config.image_column,
            config.new_columns,
            draw,
            pool,
            resolution=config.resolution,
            skip_broken=skip,
        )
        counts = {name: writer.write(name, split) for name, split in splits.items()}
        shown = splits["train"] if "train" in splits else next(iter(splits.values()))
        contact_sheet(shown, config, draw).save(partial / "contact_sheet.png")
        write_card(partial, config.source, counts, _meanings(config), config.settings())
        write_manifest(partial, SCRIPT, config.settings(), (partial / "data").iterdir())
    for path in aside:
        print(f"The earlier controls are now in {path}.")
    skipped = sum(map(len, splits.values())) - sum(counts.values())
    if skipped:
        print(f"{skipped:,} rows with broken images were skipped.")
    _report(config, counts, time.perf_counter() - started)


def _open(config: MakeControlsConfig) -> DatasetDict:
    """Open all splits without decoding their images.

    Raises:
        UserError: the dataset does not exist, has no images, or already has a column with one of the new names.
    """
    import datasets

    data = DataConfig(
        dataset_name=config.dataset_name,
        dataset_config_name=config.dataset_config_name,
        dataset_revision=config.dataset_revision,
        train_data_dir=config.train_data_dir,
        image_column=config.image_column,
    )
    data.validate()
    splits = {name: split for name, split in load_all_splits(data).items() if len(split)}
    if not splits:
        raise UserError(f"{config.source} has no rows; name a dataset with images")
    for name, split in splits.items():
        require_column(split, config.image_column, "image_column")
        for column in config.new_columns:
            if column in split.column_names:
                raise UserError(
                    f"the dataset already has a column '{column}'; give other names with --columns '[...]' in place of "
                    f"{', '.join(config.default_columns)}"
                )
        for column, feature in split.features.items():
            if isinstance(feature, datasets.Image):  # all of them are copied into the new dataset
                split = undecoded_images(split, column, "image_column", data)
        splits[name] = undecoded_images(split, config.image_column, "image_column", data)
    return datasets.DatasetDict(splits)


def drawer(config: MakeControlsConfig) -> Draw:
    """Return the function that draws all controls of an image.

    Raises:
        UserError: `config.encoder` has no layout encoder.
    """
    draws: dict[str, Draw] = {
        "edges": lambda image: [control_kinds.edges(image, config.sigma, config.low_threshold, config.high_threshold)],
        "soft_edges": lambda image: [control_kinds.soft_edges(image, config.sigma)],
        "palette": lambda image: [control_kinds.palette(image, config.colors, config.cells)],
    }
    if config.encoder:
        draws["layout"] = functools.partial(control_kinds.layout_masks, _reader(config.encoder, config.device))
    return lambda image: [control for kind in config.kinds for control in draws[kind](image)]


def _reader(path: str, device: str | None) -> Any:
    """Load the LayoutAnalysisPipeline at `path` onto its device."""
    from pipelines.tools.loading import load_on_device

    pipeline = load_on_device(path, device)
    if getattr(pipeline, "encoder", None) is None:
        raise UserError(
            f"--encoder {path} is a {type(pipeline).__name__} without a layout encoder; choose a run that has one"
        )
    return pipeline


def contact_sheet(split: Dataset, config: MakeControlsConfig, draw: Draw) -> Image:
    """Draw some images, evenly spaced over the split, each beside its controls."""
    smaller = (reduced(image, config.resolution) for image in _readable_images(split, config.image_column))
    images = ((image, draw(image)) for image in smaller)
    shown = [row for row, _ in zip(images, range(SHEET_IMAGES))]
    return sheet_of(shown, config.source, config.new_columns)


def _readable_images(split: Dataset, column: str) -> Iterator[Image]:
    for row in evenly_spaced(len(split), SHEET_IMAGES):
        try:
            yield load_rgb(split[row][column])
        except BrokenImage:
            continue


def _meanings(config: MakeControlsConfig) -> dict[str, str]:
    """Return a description of each new column."""
    kinds = [kind for kind in config.kinds for _ in (LAYOUT_MASKS if kind == "layout" else (kind,))]
    return {name: KINDS[kind] for name, kind in zip(config.new_columns, kinds, strict=True)}


def _report(config: MakeControlsConfig, counts: dict[str, int], seconds: float) -> None:
    names = config.new_columns
    flag = names[0] if len(names) == 1 else f"'[{','.join(names)}]'"
    splits = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"Wrote {config.output_dir}: {splits} ({sum(counts.values()) / seconds:.0f} images/s).")
    print(f"Look at them: {Path(config.output_dir) / 'contact_sheet.png'}")
    print("Next, train a ControlNet on them (RUN is the base model; add its --resolution):")
    words = f"--conditioning_image_column {flag} --output_dir runs/controlnet_{'_'.join(config.kinds)}"
    script = "training/train_controlnet.py"
    print("  " + command(f"{script} --base_model RUN --dataset_name {config.output_dir} {words}"))
    if len(names) > 1 and config.kinds != ["layout"]:
        print("  (each column of a list becomes one grey channel; a single column, such as "
              f"{names[-1]}, keeps its colours)")  # fmt: skip


if __name__ == "__main__":
    entry_point(main)
