"""What a collection of images has: how many images, captions and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.tools.cli import UserError
from training.data.fingerprints import evenly_spaced
from training.data.images import load_label_map
from training.data.source import DataConfig, folder_account, load_split

if TYPE_CHECKING:
    from datasets import Dataset

CAPTIONS_READ = 2000
FEW_IMAGES = 1000
_CLASSES_SHOWN = 6


@dataclass(frozen=True)
class Collection:
    """The facts about a collection of images that settings depend on."""

    source: str
    images: int
    """Number of images to train on"""
    held_out: int
    caption_words: int = 0
    """Number of words that 95 % of the captions do not exceed; 0 without captions"""
    classes: tuple[str, ...] = ()
    control_images: bool = False
    """Whether there is a control image for each image"""
    account: str = ""
    """What each file of a folder became"""

    def lines(self) -> list[str]:
        """Return sentences about the collection."""
        held_out = f" and {self.held_out:,} held out for validation" if self.held_out else ""
        captions = f"captions of up to {self.caption_words} words" if self.caption_words else "no captions"
        shown = ", ".join(self.classes[:_CLASSES_SHOWN]) + (", …" if len(self.classes) > _CLASSES_SHOWN else "")
        classes = f"{len(self.classes)} classes ({shown})" if self.classes else "no classes"
        summary = f"{self.source}: {self.images:,} images to train on{held_out}, {captions}, {classes}"
        return [self.account, summary] if self.account else [summary]


def look_at(config: DataConfig, seed: int) -> Collection:
    """Open the source that `config` names, and return what it has.

    Raises:
        UserError: the source does not exist, or cannot be read.
    """
    rows, held_out = load_split(config, "train", seed), load_split(config, "validation", seed)
    account = folder_account(config)
    controls = config.conditioning_image_column
    columns = [controls] if isinstance(controls, str) else controls
    return Collection(
        source=config.source,
        images=len(rows),
        held_out=len(held_out),
        caption_words=_words(rows, config.caption_column) if config.caption_column in rows.column_names else 0,
        classes=_classes(rows, config),
        control_images=set(columns) <= set(rows.column_names),
        account=account.line() if account else "",
    )


def _words(rows: Dataset, column: str) -> int:
    """Return the number of words that 95 % of the captions do not exceed."""
    captions = rows.select_columns([column])[evenly_spaced(len(rows), CAPTIONS_READ)][column]
    lists: list[Sequence[str]] = [value if isinstance(value, list) else [value] for value in captions]
    counts = sorted(len(text.split()) for texts in lists for text in texts if isinstance(text, str))
    return counts[int(0.95 * (len(counts) - 1))] if counts else 0


def _classes(rows: Dataset, config: DataConfig) -> tuple[str, ...]:
    """Return the classes, if there are at least two of them and each has two images on average."""
    if config.label_column not in rows.column_names:
        return ()
    try:
        names = load_label_map(config).names
    except UserError:  # a column of this name that does not hold classes
        return ()
    return tuple(names) if 2 <= len(names) <= len(rows) // 2 else ()
