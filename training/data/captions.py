"""Captioned pictures and the token ids of their captions.

B pairs, R resolution, L tokens of a caption, `<START>` and `<END>` included.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pipelines.tools.cli import UserError
from pipelines.tools.commands import command
from training.core.checks import check_bounds
from training.core.draws import SampleKey
from training.core.options import option
from training.data.fingerprints import evenly_spaced
from training.data.images import DataConfig, ImageDataset, load_split
from training.data.source import column_values, require_column
from training.data.tokenization import (
    MANY_UNKNOWN,
    SPECIAL_TOKENS,
    CaptionTokens,
    load_tokenizer,
    report_on,
    round_trip,
    smallest_vocabulary,
    train_tokenizer,
)
from training.data.transforms import RESAMPLING, BrokenImage, decoded, flips, open_image, to_tensor, upright_size

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("halftone")

CHECKED_CAPTIONS = 20_000
SHOWN_CAPTIONS = 3
ASPECT_IMAGES = 64


@dataclass
class CaptionDataConfig(DataConfig):
    """Where captioned pictures come from, and how both are read."""

    validation_fraction: float = option(0.1, at_least=0, below=1)
    """Share of the training split held out for validation when the dataset has no validation split"""
    image_fit: Literal["crop", "stretch"] = option("crop")
    """How pictures that are not square become so: crop cuts a square, stretch keeps all of a picture"""
    tokenizer: str | None = option(None)
    """Tokenizer folder or name; unset builds one from the training captions"""
    tokenizer_model: Literal["word_level", "bpe"] = option("word_level")
    """What is built: whole words, rare ones <UNK>; or byte-level pieces, nothing unknown"""
    vocab_size: int = option(8000)
    """Entries at most of the tokenizer that is built"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        smallest = smallest_vocabulary(self.tokenizer_model)
        check_bounds(f"{prefix}vocab_size", self.vocab_size, at_least=smallest)


class CaptionedImages(ImageDataset):
    """`ImageDataset` with captions, whose pictures may be stretched instead of cut (`--image_fit`)."""

    config: CaptionDataConfig

    @property
    def captioned(self) -> Dataset:
        """The stored rows, for reading captions alone."""
        return self.dataset

    def _pictures(self, row: dict[str, Any], key: int) -> dict[str, Tensor]:
        if self.config.image_fit == "crop":
            return super()._pictures(row, key)
        image = decoded(row, self.config.image_column)
        side = (self.config.resolution, self.config.resolution)
        if image.size != side:
            image = image.resize(side, RESAMPLING[self.config.image_interpolation_mode])
        pixels = to_tensor(image)
        return {"pixel_values": pixels.flip(-1) if self.random_flip and flips(key) else pixels}

    def aspect_ratio(self) -> float:
        """Width over height of the pictures as they are stored (the median of some), where they are stretched."""
        if self.config.image_fit == "crop":
            return 1.0
        ratios = []
        for row in evenly_spaced(len(self), ASPECT_IMAGES):
            try:
                image = open_image(self.dataset[row][self.config.image_column])
            except BrokenImage:
                continue  # what is to be done about it is --on_bad_sample's to say
            width, height = upright_size(image)
            ratios.append(width / height)
        return round(statistics.median(ratios), 3) if ratios else 1.0


def load_captioned(
    config: CaptionDataConfig, seed: int, caption_tokens: CaptionTokens | None = None, *, every_caption: bool = False
) -> tuple[CaptionedImages, CaptionedImages | None]:
    """Training and validation data, the latter None where nothing is held out; arguments as of `ImageDataset`.

    Raises:
        UserError: no such data.
    """
    flags: dict[str, Any] = {"caption_tokens": caption_tokens, "every_caption": every_caption}
    train = CaptionedImages(load_split(config, "train", seed), config, **flags)
    held_out = load_split(config, "validation", seed)
    return train, CaptionedImages(held_out, config, augment=False, **flags) if len(held_out) else None


def captions_of(dataset: Dataset, column: str) -> Iterator[str]:
    """Every caption that there is, read a few thousand rows at a time.

    Raises:
        UserError: the column holds no texts.
    """
    for value in column_values(dataset, column):
        for caption in value if isinstance(value, list) else [value]:
            if not isinstance(caption, str | None):
                raise UserError(
                    f"column '{column}' holds {type(caption).__name__}, not texts; choose another with --caption_column"
                )
            if caption:
                yield caption


def tokenizer_for(config: CaptionDataConfig, dataset: Dataset, max_length: int, pipeline: Path | None = None) -> Any:
    """The tokenizer that is named, or one trained on the captions of `dataset`: the same for the same captions.

    Args:
        max_length: L at most.
        pipeline: of weights that are there already. Its tokenizer is taken: with another one ids mean other words.

    Raises:
        UserError: no captions, a tokenizer that cannot mark a caption's start, end and padding, or not the pipeline's.
    """
    require_column(dataset, config.caption_column, "caption_column")
    if pipeline is not None:
        tokenizer = load_tokenizer(str(pipeline / "tokenizer"))
        if config.tokenizer and load_tokenizer(config.tokenizer).get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"the tokenizer '{config.tokenizer}' is not that of the weights in {pipeline}: its ids mean other "
                "words; leave --tokenizer unset, and theirs is taken"
            )
    elif config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
        for name, token in (("start", tokenizer.bos_token), ("end", tokenizer.eos_token)):
            if token is None:
                raise UserError(
                    f"the tokenizer '{config.tokenizer}' has no token for a caption's {name}; leave --tokenizer unset "
                    f"and one is built, or make one: {command('data_scripts/train_tokenizer.py')}"
                )
    else:
        tokenizer = train_tokenizer(
            captions_of(dataset, config.caption_column),
            model=config.tokenizer_model,
            vocab_size=config.vocab_size,
            model_max_length=max_length,
            length=len(dataset),
        )
        if len(tokenizer) <= len(SPECIAL_TOKENS):
            raise UserError(
                f"column '{config.caption_column}' has no captions to build a tokenizer from; "
                "choose another with --caption_column"
            )
    tokenizer.model_max_length = max_length
    return tokenizer


def tell_round_trips(tokenizer: Any, held_out: Dataset, train: Dataset, column: str, name: str) -> None:
    """Print what the tokenizer makes of captions it was not built from, and say once how many are cut in training.

    Args:
        held_out: captions to look at, `name` in the messages.
        train: captions to train on.
    """
    for caption in itertools.islice(captions_of(held_out, column), SHOWN_CAPTIONS):
        logger.info("%s", round_trip(tokenizer, caption))
    report = report_on(tokenizer, itertools.islice(captions_of(held_out, column), CHECKED_CAPTIONS))
    logger.info(
        "tokenizer of %s entries: %s of %s %s captions come back whole, %.2f%% of their tokens are unknown, "
        "the longest has %d tokens",
        f"{len(tokenizer):,}",
        f"{report.round_trips:,}",
        f"{report.captions:,}",
        name,
        100 * report.unknown_share,
        report.longest,
    )
    if report.unknown_share > MANY_UNKNOWN:
        logger.warning("many words are unknown: raise --vocab_size, or take --tokenizer_model bpe")
    report = report_on(tokenizer, itertools.islice(captions_of(train, column), CHECKED_CAPTIONS))
    if report.cut:
        logger.warning(
            "%s of %s training captions have more than %d tokens and are cut there; --model.max_length sets the limit",
            f"{report.cut:,}",
            f"{report.captions:,}",
            tokenizer.model_max_length,
        )


def pixel_variance(data: ImageDataset, pictures: int) -> float:
    """Of the pixels of some pictures from all over the data, around the mean picture."""
    keys = [SampleKey(row, 0) for row in evenly_spaced(len(data), pictures)]
    pixels = torch.stack([data[key]["pixel_values"] for key in keys])
    return float((pixels - pixels.mean(0)).square().mean().clamp(min=1e-4))
