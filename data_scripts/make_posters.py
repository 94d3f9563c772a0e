"""Make a dataset of posters, each with its caption, brief, feature maps and element boxes.

    python data_scripts/make_posters.py --output_dir data/posters_64 --num_posters 2000 --resolution 64

A poster depends only on the seed, its number and the options, so the same command gives the same bytes with any number
of processes. The folder loads with `datasets.load_dataset("data/posters_64")`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_scripts.dataset_folder import (
    check_replaceable,
    is_made_by,
    making,
    new_folder,
    read_settings,
    write_manifest,
)
from data_scripts.posters.contact_sheet import contact_sheet
from data_scripts.posters.dataset import SPLITS, split_indices, write_card, write_dataset
from data_scripts.posters.records import PosterOptions, make_row
from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.commands import command
from training.core.options import Options, option
from training.core.parsing import parse_config

FORMAT_VERSION = 3
"""Increased whenever the same options would give different rows."""

SCRIPT = "make_posters.py"
CONTACT_SHEET_POSTERS = 18
HELD_OUT_MINIMUM = 64
"""Minimum number of posters in validation and in test for 1,000 posters or more; metrics on fewer are too noisy."""


@dataclass
class MakePostersConfig(Options):
    output_dir: str = "data/posters_64"
    """Folder to write; it must be empty or not exist yet"""
    num_posters: int = option(2000, at_least=1)
    """Number of posters in all splits together"""
    resolution: Literal[64, 128, 256] = 64
    """Width and height in pixels"""
    complexity: Literal["plain", "standard", "rich"] = "plain"
    """How complex the posters are. plain: flat shapes on a grid in palette colours; standard: also gradients,
    overlaps, rules, pictures in the poster's own colours and traces of printing and scanning; rich: also rotated
    text, photographs and JPEG noise"""
    seed: int = option(0, at_least=0)
    """Random seed; another seed gives other posters"""
    validation_fraction: float = option(0.05, at_least=0, below=1)
    """Fraction of the posters held out for validation"""
    test_fraction: float = option(0.05, at_least=0, below=1)
    """Fraction of the posters held out for the test split"""
    num_workers: int = option(0, at_least=0)
    """Number of processes that draw; 0 uses one per CPU core. It does not change the posters"""
    overwrite: bool = False
    """Rename an earlier poster dataset in --output_dir (it is not deleted), and make a new one"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.split_sizes()["train"] < 1:
            raise UserError(
                f"nothing is left to train on: --num_posters {self.num_posters} with --validation_fraction "
                f"{self.validation_fraction} and --test_fraction {self.test_fraction}; make more or hold out fewer"
            )

    def split_sizes(self) -> dict[str, int]:
        held_out = {}
        for split, fraction in (("validation", self.validation_fraction), ("test", self.test_fraction)):
            count = round(fraction * self.num_posters)
            least = HELD_OUT_MINIMUM if self.num_posters >= 1000 and fraction > 0 else 0
            held_out[split] = max(count, least)
        return {"train": self.num_posters - sum(held_out.values()), **held_out}

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the bytes of the dataset."""
        names = ("num_posters", "resolution", "complexity", "seed", "validation_fraction", "test_fraction")
        return {"format_version": FORMAT_VERSION, **{name: getattr(self, name) for name in names}}


def main(argv: Sequence[str] | None = None) -> int | None:
    config = parse_config(MakePostersConfig, argv, description=__doc__)
    with making(Path(config.output_dir)) as folder:
        if _already_made(folder, config):
            print(f"{config.output_dir} already holds exactly these {config.num_posters:,} posters; nothing to do.")
        else:
            _make(config, folder)
    return 0


def _make(config: MakePostersConfig, folder: Path) -> None:
    """Draw the posters and write them to `folder`."""
    workers = min(config.num_workers or os.cpu_count() or 1, config.num_posters)
    kind = f"{config.complexity} posters at {config.resolution} px"
    print(f"Drawing {config.num_posters:,} {kind} with {workers} process(es); a few thousand take less than a minute.")
    started = time.perf_counter()
    with new_folder(folder) as (partial, aside):
        parts = split_indices(config.num_posters, config.split_sizes(), config.seed)
        options = PosterOptions(config.seed, config.resolution, config.complexity)
        write_dataset(partial, options, parts, workers)
        shown = [make_row(options, index) for index in parts["train"][:CONTACT_SHEET_POSTERS]]
        contact_sheet(shown).save(partial / "contact_sheet.png")
        write_card(partial, config.settings(), parts)
        write_manifest(partial, SCRIPT, config.settings(), (partial / "data").iterdir())
    for path in aside:
        print(f"The earlier posters are now in {path}.")
    _report(Path(config.output_dir), config, parts, time.perf_counter() - started)


def _already_made(folder: Path, config: MakePostersConfig) -> bool:
    """Return whether `folder` already holds exactly this dataset, complete.

    Raises:
        UserError: `folder` holds posters with other settings and --overwrite was not given, or it holds something that
            is not a poster dataset.
    """
    settings = read_settings(folder) if folder.is_dir() and is_made_by(folder, SCRIPT) else None
    if settings is None or config.overwrite:
        check_replaceable(folder, SCRIPT, "posters", config.overwrite)
        return False
    if settings == config.settings():
        return True
    different = [name for name, value in config.settings().items() if settings.get(name) != value]
    raise UserError(
        f"--output_dir {folder} holds posters with other settings ("
        + ", ".join(f"{name} is {settings.get(name)} there, {config.settings()[name]} here" for name in different)
        + "); choose another folder, or add --overwrite to set them aside"
    )


def _report(folder: Path, config: MakePostersConfig, parts: dict[str, list[int]], seconds: float) -> None:
    counts = ", ".join(f"{split} {len(parts[split]):,}" for split in SPLITS)
    print(f"Wrote {folder}: {counts} ({config.num_posters / seconds:.0f} posters/s).")
    print(f"Look at them: {folder / 'contact_sheet.png'} (posters, masks, captions)")
    print("Next, train on them:")
    words = f"--dataset_name {folder} --resolution {config.resolution}"
    print(f"  {command(f'training/train_autoencoder.py {words}')}")


if __name__ == "__main__":
    entry_point(main)
