"""Datasets of images with captions, and the tokenizer of their captions.

B pairs, R resolution, L tokens of a caption, including `<START>` and `<END>`.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from pipelines.tools.cli import UserError
from pipelines.tools.commands import command
from training.core.checks import check_bounds
from training.core.draws import SampleKey
from training.core.options import option
from training.data.caption_text import MAX_CAPTION_CHARACTERS, caption_problem, cleaned_caption
from training.data.fingerprints import evenly_spaced
from training.data.images import DataConfig, ImageDataset, load_split, row_id
from training.data.source import column_values, require_column
from training.data.tokenization import (
    MANY_UNKNOWN,
    CaptionTokens,
    TokenizerModel,
    load_tokenizer,
    report_on,
    round_trip,
    smallest_vocabulary,
    train_suitable_tokenizer,
    unknown_words_advice,
)
from training.data.transforms import RESAMPLING, BrokenImage, decoded, flips, to_tensor, verify_image

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("halftone")

CHECKED_CAPTIONS = 20_000
SHOWN_CAPTIONS = 3
ASPECT_IMAGES = 64


@dataclass
class CaptionDataConfig(DataConfig):
    """Source of images with captions, and how both are read."""

    help_group = "Data"
    image_modes: ClassVar[tuple[str, ...]] = ("rgb",)

    validation_fraction: float = option(0.1, at_least=0, below=1)
    """Fraction of the training split held out for validation if the dataset has no validation split; 0 disables it"""
    image_fit: Literal["crop", "stretch"] = option("crop")
    """How images are made square: crop cuts out a square, stretch rescales the whole image and changes its aspect
    ratio"""
    tokenizer: str | None = option(None, content="tokenizer")
    """Tokenizer folder or Hub id; if unset, a tokenizer is trained on the training captions"""
    tokenizer_model: TokenizerModel = option("auto", on_resume="free")
    """Type of tokenizer to train: word_level has whole words, and <UNK> for rare ones; bpe has byte-level pieces; auto
    chooses bpe for fewer than 5,000 captions or many unknown words. A resumed run keeps its tokenizer"""
    vocab_size: int = option(8000)
    """Maximum vocabulary size of the tokenizer to train"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        smallest = smallest_vocabulary(self.tokenizer_model)
        check_bounds(f"{prefix}vocab_size", self.vocab_size, at_least=smallest)
        if self.image_fit == "stretch" and self.pad_to_square:
            raise UserError("--pad_to_square and --image_fit stretch both keep whole images; leave one of them out")
        if self.image_fit == "stretch" and self.crop_scale < 1:
            raise UserError(
                f"--crop_scale {self.crop_scale:g} cuts out squares, but --image_fit stretch keeps whole images; use "
                "--crop_scale 1 or --image_fit crop"
            )


class CaptionedImages(ImageDataset):
    """`ImageDataset` with captions; `--image_fit stretch` stretches images to a square instead of cropping them."""

    config: CaptionDataConfig

    @property
    def captioned(self) -> Dataset:
        """The stored rows, to read captions without decoding images."""
        return self.dataset

    def _images(self, row: dict[str, Any], key: SampleKey) -> dict[str, Tensor]:
        if self.config.image_fit == "crop":
            return super()._images(row, key)
        image = decoded(row, self.config.image_column)
        side = (self.config.resolution, self.config.resolution)
        if image.size != side:
            image = image.resize(side, RESAMPLING[self.config.image_interpolation_mode])
        pixels = to_tensor(image)
        return {"pixel_values": pixels.flip(-1) if self.random_flip and flips(key.key) else pixels}

    def aspect_ratio(self) -> float:
        """Return the median of width / height over some of the stored images if images are stretched, otherwise 1."""
        if self.config.image_fit == "crop":
            return 1.0
        ratios = []
        for row in evenly_spaced(len(self), ASPECT_IMAGES):
            try:
                width, height = verify_image(self.dataset[row][self.config.image_column])
            except BrokenImage:
                continue  # --on_bad_sample decides what happens with this row when it is trained on
            ratios.append(width / height)
        return round(statistics.median(ratios), 3) if ratios else 1.0


def load_captioned(
    config: CaptionDataConfig, seed: int, caption_tokens: CaptionTokens | None = None, *, every_caption: bool = False
) -> tuple[CaptionedImages, CaptionedImages | None]:
    """Return the training and the validation dataset; the latter is None if nothing is held out.

    See `ImageDataset` for `caption_tokens` and `every_caption`.

    Raises:
        UserError: the data do not exist or cannot be read.
    """
    flags: dict[str, Any] = {"caption_tokens": caption_tokens, "every_caption": every_caption}
    train = CaptionedImages(load_split(config, "train", seed), config, **flags)
    held_out = load_split(config, "validation", seed)
    return train, CaptionedImages(held_out, config, augment=False, **flags) if len(held_out) else None


def captions_of(dataset: Dataset, column: str, on_bad_sample: Literal["error", "skip"] = "skip") -> Iterator[str]:
    """Yield every caption of a column that is not empty, reading a few thousand rows at a time.

    Control characters are removed.

    Args:
        on_bad_sample: what to do about captions that are too long.

    Raises:
        UserError: the column does not hold texts, or a caption is too long and `on_bad_sample` is "error".
    """
    for row, value in enumerate(column_values(dataset, column)):
        for caption in value if isinstance(value, list) else [value]:
            if not isinstance(caption, str | None):
                raise UserError(
                    f"column '{column}' holds {type(caption).__name__}, not texts; choose another with --caption_column"
                )
            if caption and len(caption) > MAX_CAPTION_CHARACTERS:
                if on_bad_sample == "error":
                    raise UserError(
                        f"row {row_id(dataset, row)}, column '{column}': {caption_problem(caption)}; shorten it, or "
                        "skip such rows with --on_bad_sample skip"
                    )
            elif caption and (cleaned := cleaned_caption(caption)):
                yield cleaned


def tokenizer_for(
    config: CaptionDataConfig,
    dataset: Dataset,
    max_length: int,
    pipeline: Path | None = None,
    held_out: Dataset | None = None,
) -> Any:
    """Return the tokenizer named in the config, or train one on the captions of `dataset`.

    Training is deterministic: the same captions give the same tokenizer.

    Args:
        max_length: maximum number of tokens L of a caption.
        pipeline: folder of the weights that training starts from, if any. Their tokenizer is used, because with another
            one the token ids would mean other words.
        held_out: rows with other captions, which show how many words would be unknown.

    Raises:
        UserError: the captions are empty, the tokenizer lacks a token for the start, the end or padding, or the config
            names another tokenizer than that of `pipeline`.
    """
    require_column(dataset, config.caption_column, "caption_column")
    if pipeline is not None:
        tokenizer = load_tokenizer(str(pipeline / "tokenizer"))
        if config.tokenizer and load_tokenizer(config.tokenizer).get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"the tokenizer '{config.tokenizer}' is not the tokenizer of the weights in {pipeline}: its ids mean "
                "other words; leave --tokenizer unset to use theirs"
            )
    elif config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
        for name, token in (("start", tokenizer.bos_token), ("end", tokenizer.eos_token)):
            if token is None:
                raise UserError(
                    f"the tokenizer '{config.tokenizer}' has no token for the {name} of a caption; leave --tokenizer "
                    f"unset to train one, or make one with {command('data_scripts/train_tokenizer.py')}"
                )
    else:
        others, column = held_out if held_out is not None and len(held_out) else dataset, config.caption_column
        tokenizer, choice = train_suitable_tokenizer(
            lambda: captions_of(dataset, column, config.on_bad_sample),
            lambda: captions_of(others, column),
            model=config.tokenizer_model,
            vocab_size=config.vocab_size,
            model_max_length=max_length,
            length=len(dataset),
        )
        logger.info("%s", choice)
    tokenizer.model_max_length = max_length
    return tokenizer


def tell_round_trips(
    tokenizer: Any, config: CaptionDataConfig, held_out: Dataset, train: Dataset, name: str, *, may_change: bool
) -> None:
    """Log how captions are encoded and decoded again, and warn if captions to train on are too long.

    Args:
        may_change: whether the tokenizer was trained for this run, so that other settings would make another one.
        held_out: captions to encode and decode, preferably ones that the tokenizer was not trained on.
        train: captions to train on.
        name: what the messages call `held_out`.
    """
    column = config.caption_column
    for caption in itertools.islice(captions_of(held_out, column), SHOWN_CAPTIONS):
        logger.info("%s", round_trip(tokenizer, caption))
    report = report_on(tokenizer, itertools.islice(captions_of(held_out, column), CHECKED_CAPTIONS))
    logger.info(
        "tokenizer with %s entries: %s of %s %s captions are decoded without loss, %.2f%% of their tokens are unknown, "
        "the longest has %d tokens",
        f"{len(tokenizer):,}",
        f"{report.round_trips:,}",
        f"{report.captions:,}",
        name,
        100 * report.unknown_share,
        report.longest,
    )
    if report.unknown_share > MANY_UNKNOWN:
        advice = (
            unknown_words_advice(tokenizer, "--tokenizer_model", vocab_size=config.vocab_size) if may_change else ""
        )
        logger.warning("many words are unknown%s", f": {advice}" if advice else ", because others made the tokenizer")
    report = report_on(tokenizer, itertools.islice(captions_of(train, column), CHECKED_CAPTIONS))
    if report.cut:
        logger.warning(
            "%s of %s training captions have more than %d tokens and are truncated; --model.max_length sets the limit",
            f"{report.cut:,}",
            f"{report.captions:,}",
            tokenizer.model_max_length,
        )


def pixel_variance(data: ImageDataset, num_images: int) -> float:
    """Return the variance of pixels around the mean image, over at most `num_images` evenly spaced rows."""
    keys = [SampleKey(row, 0) for row in evenly_spaced(len(data), num_images)]
    pixels = torch.stack([data[key]["pixel_values"] for key in keys])
    return float((pixels - pixels.mean(0)).square().mean().clamp(min=1e-4))
