"""Make control images for a ControlNet from the images of a dataset: edges, palettes, or layouts.

    python data_scripts/make_controls.py --train_data_dir my_pictures --kind edges --output_dir data/my_edges
    python data_scripts/make_controls.py --dataset_name data/a --kind '[soft_edges, palette]' --output_dir data/both
    python data_scripts/make_controls.py --dataset_name data/a --kind layout --encoder runs/encoder --output_dir data/b

The new dataset has all splits and columns of the old one, and control images of its pictures' own sizes: column
`conditioning_image`, or with several kinds a column each, named after it; a layout is two: `text_mask`, `image_mask`.
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
from data_scripts.controls.dataset import ControlWriter, Draw, write_card
from data_scripts.controls.kinds import KINDS, LAYOUT_MASKS
from data_scripts.controls.sheet import sheet_of
from data_scripts.dataset_folder import partial_folder, put_in_place, read_settings, write_manifest
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
"""Raised whenever the same pictures and options would give other controls."""

SHEET_PICTURES = 24


@dataclass
class MakeControlsConfig(Options):
    """Flags of this script."""

    dataset_name: str | None = None
    """Pictures: a Hub id, or a local folder or file (imagefolder, Parquet, JSON, or written by save_to_disk)"""
    dataset_config_name: str | None = None
    """Configuration of the dataset, for those that have several"""
    train_data_dir: str | None = None
    """Folder of pictures, instead of dataset_name"""
    image_column: str = "image"
    """Column with the pictures"""
    output_dir: str = ""
    """Folder to make; it must not exist yet, or be empty"""
    kind: list[str] | str = field(default_factory=list)
    """What to draw: edges, soft_edges, palette or layout; a list gives a column each"""
    columns: list[str] = field(default_factory=list)
    """Names of the new columns, one for each, where the usual ones will not do"""
    sigma: float = option(0.7, at_least=0)
    """Edges of both kinds: blur before they are looked for, in pixels; more leaves less detail"""
    low_threshold: float = 0.03
    """Edges: weaker ones are left out; a share of the step from none to all of a colour"""
    high_threshold: float = 0.1
    """Edges: from this share on they are strong; weak ones are kept where they touch a strong one"""
    colors: int = 6
    """Palette: colours in a picture, at most"""
    cells: int = 8
    """Palette: cells along the shorter side"""
    encoder: str | None = None
    """Layout: a run of train_encoder.py, its checkpoint or pipeline, or a Hub id"""
    device: str | None = None
    """Where models run: cpu, cuda, cuda:1, mps, ...; unset: the GPU if there is one, otherwise the CPU"""
    num_workers: int = 0
    """Threads that read and draw; 0 is one per CPU core"""
    on_bad_sample: Literal["error", "skip"] = "error"
    """A broken picture: stop and name its row, or leave the row out"""
    overwrite: bool = False
    """Set earlier controls in output_dir aside (renamed, not deleted) and make these"""

    @property
    def kinds(self) -> list[str]:
        return [self.kind] if isinstance(self.kind, str) else list(self.kind)

    def validate(self, prefix: str = "") -> None:
        """Raises UserError for what is impossible whatever the data."""
        super().validate(prefix)
        if not self.output_dir:
            raise UserError("--output_dir is missing: the folder to make")
        if not self.kinds:
            raise UserError(f"--kind is missing: one or more of {', '.join(KINDS)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"--kind {kind} is none of {', '.join(KINDS)}{nearest(kind, KINDS)}")
        if len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"--kind names one twice: {', '.join(self.kinds)}")
        if ("layout" in self.kinds) != bool(self.encoder):
            fault = (
                "is read by a layout encoder" if not self.encoder else f"is not asked for, but --encoder {self.encoder}"
            )
            raise UserError(f"a layout {fault}; --kind layout and --encoder RUN (of train_encoder.py) go together")
        usual = self.usual_columns
        if self.columns and (len(self.columns) != len(usual) or len(set(self.columns)) < len(usual)):
            raise UserError(
                f"--columns {self.columns}: give {len(usual)} different names, in place of {', '.join(usual)}"
            )
        if not 0 <= self.low_threshold <= self.high_threshold <= 1:
            raise UserError(
                f"--low_threshold {self.low_threshold} and --high_threshold {self.high_threshold}: both are shares in "
                "[0, 1], the low one not above the high one"
            )
        for name, least, most in (("colors", 1, 256), ("cells", 1, 4096), ("num_workers", 0, 1024)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name} is {getattr(self, name)}; give {least} to {most}")

    @property
    def usual_columns(self) -> list[str]:
        if len(self.kinds) == 1 and self.kinds != ["layout"]:
            return ["conditioning_image"]
        return [name for kind in self.kinds for name in (LAYOUT_MASKS if kind == "layout" else (kind,))]

    @property
    def new_columns(self) -> list[str]:
        return self.columns or self.usual_columns

    @property
    def source(self) -> str:
        """The dataset's name, for people: of a local one without the folders above it."""
        name = self.dataset_name or self.train_data_dir or ""
        return Path(name).expanduser().resolve().name if Path(name).expanduser().exists() else name

    def settings(self) -> dict[str, Any]:
        """What the controls were made with."""
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
        shared = {"made_by": "make_controls.py", "format_version": FORMAT_VERSION, "source": self.source}
        return {**shared, "kinds": self.kinds, "columns": self.new_columns, **values}


def main(argv: Sequence[str] | None = None) -> int | None:
    config = parse_config(MakeControlsConfig, argv, description=__doc__)
    folder = Path(config.output_dir).expanduser()
    control_kinds.require_scikit_image(config.kinds)
    _check_folder(folder, config)
    splits = _open(config)
    draw = drawer(config)
    started = time.perf_counter()
    # An encoder takes all cores for one picture.
    workers = config.num_workers or (1 if config.encoder else os.cpu_count() or 1)
    skip = config.on_bad_sample == "skip"
    with partial_folder(folder) as partial, ThreadPoolExecutor(workers) as pool:
        writer = ControlWriter(partial, config.image_column, config.new_columns, draw, pool, skip_broken=skip)
        counts = {name: writer.write(name, split) for name, split in splits.items()}
        shown = splits["train"] if "train" in splits else next(iter(splits.values()))
        contact_sheet(shown, config, draw).save(partial / "contact_sheet.png")
        write_card(partial, config.source, counts, _meanings(config), config.settings())
        write_manifest(partial, config.settings())
        aside = put_in_place(partial, folder)
    if aside:
        print(f"The earlier controls are now in {aside}.")
    skipped = sum(map(len, splits.values())) - sum(counts.values())
    if skipped:
        print(f"{skipped:,} rows with broken pictures were left out.")
    _report(config, counts, time.perf_counter() - started)
    return 0


def _check_folder(folder: Path, config: MakeControlsConfig) -> None:
    """Raises UserError where `folder` holds something, unless it may be set aside."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    settings = read_settings(folder) or {}
    if settings.get("made_by") != "make_controls.py":
        raise UserError(f"--output_dir {folder} is not empty and holds no complete controls; name another folder")
    if not config.overwrite:
        raise UserError(
            f"--output_dir {folder} holds controls already ({', '.join(settings['kinds'])} of {settings['source']}); "
            "name another folder, or add --overwrite to set them aside"
        )


def _open(config: MakeControlsConfig) -> DatasetDict:
    """All splits, their pictures undecoded.

    Raises:
        UserError: no such data, no pictures in it, or columns of the new names.
    """
    import datasets

    data = DataConfig(
        dataset_name=config.dataset_name,
        dataset_config_name=config.dataset_config_name,
        train_data_dir=config.train_data_dir,
        image_column=config.image_column,
    )
    data.validate()
    splits = {name: split for name, split in load_all_splits(data).items() if len(split)}
    if not splits:
        raise UserError(f"{config.source} has no rows; give it some pictures")
    for name, split in splits.items():
        require_column(split, config.image_column, "image_column")
        for column in config.new_columns:
            if column in split.column_names:
                raise UserError(
                    f"the dataset has a column '{column}' already; name the new ones otherwise: --columns '[...]', in "
                    f"place of {', '.join(config.usual_columns)}"
                )
        splits[name] = undecoded_images(split, config.image_column, "image_column")
    return datasets.DatasetDict(splits)


def drawer(config: MakeControlsConfig) -> Draw:
    """What draws all the controls of a picture.

    Raises:
        UserError: an encoder that is none.
    """
    draws: dict[str, Draw] = {
        "edges": lambda p: [control_kinds.edges(p, config.sigma, config.low_threshold, config.high_threshold)],
        "soft_edges": lambda p: [control_kinds.soft_edges(p, config.sigma)],
        "palette": lambda p: [control_kinds.palette(p, config.colors, config.cells)],
    }
    if config.encoder:
        draws["layout"] = functools.partial(control_kinds.layout_masks, _reader(config.encoder, config.device))
    return lambda picture: [control for kind in config.kinds for control in draws[kind](picture)]


def _reader(path: str, device: str | None) -> Any:
    """The LayoutAnalysisPipeline at `path`, on its device."""
    from pipelines.tools.loading import load_on_device

    pipeline = load_on_device(path, device)
    if getattr(pipeline, "encoder", None) is None:
        raise UserError(
            f"--encoder {path} is a {type(pipeline).__name__} without a layout encoder; name a run that has one"
        )
    return pipeline


def contact_sheet(split: Dataset, config: MakeControlsConfig, draw: Draw) -> Image:
    """Some pictures, evenly spaced over the split, each beside its controls."""
    pictures = ((picture, draw(picture)) for picture in _whole(split, config.image_column))
    shown = [row for row, _ in zip(pictures, range(SHEET_PICTURES))]
    return sheet_of(shown, config.source, config.new_columns)


def _whole(split: Dataset, column: str) -> Iterator[Image]:
    for row in evenly_spaced(len(split), SHEET_PICTURES):
        try:
            yield load_rgb(split[row][column])
        except BrokenImage:
            continue


def _meanings(config: MakeControlsConfig) -> dict[str, str]:
    """What each new column shows."""
    kinds = [kind for kind in config.kinds for _ in (LAYOUT_MASKS if kind == "layout" else (kind,))]
    return {name: KINDS[kind] for name, kind in zip(config.new_columns, kinds, strict=True)}


def _report(config: MakeControlsConfig, counts: dict[str, int], seconds: float) -> None:
    names = config.new_columns
    flag = names[0] if len(names) == 1 else f"'[{','.join(names)}]'"
    splits = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"Wrote {config.output_dir}: {splits} ({sum(counts.values()) / seconds:.0f} pictures/s).")
    print(f"Look at them: {Path(config.output_dir) / 'contact_sheet.png'}")
    print("Next, train on them, with the model to steer and its resolution:")
    words = f"--conditioning_image_column {flag} --output_dir runs/controlnet_{'_'.join(config.kinds)}"
    script = "training/train_controlnet.py"
    print("  " + command(f"{script} --base_model RUN --dataset_name {config.output_dir} {words}"))
    if len(names) > 1 and config.kinds != ["layout"]:
        print("  (a list of columns gives a grey channel each; a single one, such as "
              f"{names[-1]}, is taken in colour)")  # fmt: skip


if __name__ == "__main__":
    entry_point(main)
