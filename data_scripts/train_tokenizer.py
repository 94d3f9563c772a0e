"""Train a tokenizer on the captions of a dataset, and show how it splits held-out captions into tokens.

    python data_scripts/train_tokenizer.py --dataset_name data/posters_64 --output_dir data/posters_64/tokenizer

The folder loads with transformers.AutoTokenizer.from_pretrained, even where this project is not installed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_scripts.dataset_folder import making, new_folder
from pipelines.tools.cli import UserError, entry_point, printable
from training.core.made_folders import tokenizer_problem
from training.core.options import option
from training.core.parsing import parse_config
from training.data.captions import captions_of
from training.data.source import DataConfig, load_split, require_column
from training.data.tokenization import (
    MANY_UNKNOWN,
    TokenizerModel,
    TokenizerReport,
    empty_vocabulary,
    is_word_level,
    report_on,
    round_trip,
    save_tokenizer,
    smallest_vocabulary,
    train_suitable_tokenizer,
    unknown_words_advice,
    usual_frequency,
)

EXAMPLES = 3
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""The files that Transformers 4 and 5 write for a tokenizer that is made here."""


@dataclass
class TokenizerConfig(DataConfig):
    """Flags of this script."""

    output_dir: str = ""
    """Folder to write the tokenizer and its Transformers configuration to (required)"""
    model: TokenizerModel = "auto"
    """word_level: whole words, rare ones become <UNK>; bpe: byte-level pieces, so no word is unknown; auto: bpe if
    there are fewer than 5,000 captions, or if more than 5% of the words in held-out captions would be unknown"""
    vocab_size: int = 8000
    """Maximum size of the vocabulary, including the four special tokens"""
    min_frequency: int | None = option(None, at_least=1)
    """Minimum number of occurrences of a word (bpe: of a pair of pieces) in the vocabulary; if unset, 1 (bpe: 2)"""
    lowercase: bool = True
    """Convert captions to lower case first"""
    model_max_length: int = option(77, at_least=3)
    """Maximum number of tokens per caption, including <START> and <END>; longer captions are truncated"""
    seed: int = 0
    """Random seed that selects the held-out rows (without a validation split)"""
    overwrite: bool = False
    """Rename an earlier tokenizer in --output_dir (it is not deleted), and make a new one; models trained with the
    earlier one do not work with the new one"""

    def validate(self, prefix: str = "") -> None:
        """Check values before any data is opened.

        Raises:
            UserError: a value is missing or invalid.
        """
        super().validate(prefix)
        if not self.output_dir:
            raise UserError("--output_dir is missing; it is the folder to write the tokenizer to")
        smallest = smallest_vocabulary(self.model)
        if self.vocab_size < smallest:
            raise UserError(
                f"vocab_size is {self.vocab_size}; --vocab_size must be at least {smallest} for {self.model}"
            )


def main(argv: Sequence[str] | None = None) -> int | None:
    config = parse_config(TokenizerConfig, argv, description=__doc__)
    with making(Path(config.output_dir)) as folder:
        _check_replaceable(folder, config.overwrite)
        _make(config, folder)
    return 0


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    """Check that `folder` is missing, empty, or holds a tokenizer and nothing else; a complete one is kept.

    Raises:
        UserError: it holds other files, or a complete tokenizer and `overwrite` is false.
    """
    others = sorted({path.name for path in folder.iterdir()} - set(FILES)) if folder.is_dir() else []
    if others or (folder.exists() and not folder.is_dir()):
        holds = f"holds {', '.join(others[:3])}, which is not part of a tokenizer" if others else "is a file"
        raise UserError(f"--output_dir {folder} {holds}; choose another folder, such as {folder / 'tokenizer'}")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        problem = tokenizer_problem(folder)
        if problem is None:
            raise UserError(
                f"{folder} already holds a tokenizer; choose another --output_dir, or set the "
                "existing one aside with --overwrite true"
            )
        print(f"{folder} {problem}, so it is made again.")


def _make(config: TokenizerConfig, folder: Path) -> None:
    """Train the tokenizer and write it to `folder`."""
    train = load_split(config, "train", config.seed)
    require_column(train, config.caption_column, "caption_column")
    validation = load_split(config, "validation", config.seed)
    print(f"Training a tokenizer on the captions of {len(train):,} rows.")
    seen, name = (validation, "validation") if len(validation) else (train, "training")
    tokenizer, choice = train_suitable_tokenizer(
        lambda: captions_of(train, config.caption_column, config.on_bad_sample),
        lambda: captions_of(seen, config.caption_column),
        model=config.model,
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        lowercase=config.lowercase,
        model_max_length=config.model_max_length,
        length=len(train),
    )
    kind: TokenizerModel = "word_level" if is_word_level(tokenizer) else "bpe"
    frequency = config.min_frequency or usual_frequency(kind)
    if len(tokenizer) == empty_vocabulary(kind) and frequency > usual_frequency(kind):
        raise UserError(
            f"no {'word' if kind == 'word_level' else 'pair of letters'} in column '{config.caption_column}' occurs "
            f"{frequency} times; lower --min_frequency, or choose another --caption_column"
        )
    print(choice)
    for caption in itertools.islice(captions_of(seen, config.caption_column), EXAMPLES):
        print(printable(round_trip(tokenizer, caption)))
    report = report_on(tokenizer, captions_of(seen, config.caption_column))
    units = "words" if kind == "word_level" else "pieces of words"
    print(describe(report, f"{name} captions", units, tokenizer.model_max_length))
    if report.unknown_share > MANY_UNKNOWN:
        limits = {"vocab_size": config.vocab_size, "min_frequency": frequency}
        print(f"To lower this share, {unknown_words_advice(tokenizer, '--model', **limits)}.")
    with new_folder(folder) as (partial, aside):
        save_tokenizer(tokenizer, partial)
    for path in aside:
        print(f"The earlier tokenizer is now in {path}.")
    print(f"The tokenizer ({len(tokenizer):,} entries) is in {config.output_dir}")
    print(f"Train with it: --tokenizer {config.output_dir}")


def describe(report: TokenizerReport, captions: str, units: str, limit: int) -> str:
    """Return the report in sentences."""
    sentences = [
        f"Of {report.words:,} {units} in {report.captions:,} {captions}, {report.unknown_share:.2%} are unknown; "
        f"{report.round_trips:,} captions are unchanged after encoding and decoding, apart from normalization.",
        f"The longest caption has {report.longest} tokens"
        + (f"; {report.cut:,} are truncated to {limit} (--model_max_length)." if report.cut else "."),
    ]
    return "\n".join(sentences)


if __name__ == "__main__":
    entry_point(main)
