"""Train a tokenizer on the captions of a dataset, and show how it splits held-out captions into tokens.

    python data_scripts/train_tokenizer.py --dataset_name data/posters_64 --output_dir data/posters_64/tokenizer

The folder loads with transformers.AutoTokenizer.from_pretrained, even where this project is not installed.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.tools.cli import UserError, entry_point
from training.core.files import write_atomically
from training.core.options import option
from training.core.parsing import parse_config
from training.data.captions import captions_of
from training.data.source import DataConfig, load_split, require_column
from training.data.tokenization import (
    MANY_UNKNOWN,
    SPECIAL_TOKENS,
    TokenizerReport,
    report_on,
    round_trip,
    save_tokenizer,
    smallest_vocabulary,
    train_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EXAMPLES = 3


@dataclass
class TokenizerConfig(DataConfig):
    """Flags of this script."""

    output_dir: str = ""
    """Folder to write the tokenizer and its Transformers configuration to (required)"""
    model: Literal["word_level", "bpe"] = "word_level"
    """word_level: whole words, rare ones become <UNK>; bpe: byte-level pieces, so no word is unknown"""
    vocab_size: int = 8000
    """Maximum size of the vocabulary, including the four special tokens"""
    min_frequency: int = option(1, at_least=1)
    """Minimum number of occurrences of a word (bpe: of a pair of pieces) to enter the vocabulary"""
    lowercase: bool = True
    """Convert captions to lower case first"""
    model_max_length: int = option(77, at_least=3)
    """Maximum number of tokens per caption, including <START> and <END>; longer captions are truncated"""
    seed: int = 0
    """Random seed that selects the held-out rows (without a validation split)"""
    overwrite: bool = False
    """Replace an existing tokenizer; models trained with it do not work with the new one"""

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
        if Path(self.output_dir, "tokenizer.json").exists() and not self.overwrite:
            raise UserError(
                f"{self.output_dir} already holds a tokenizer; choose another --output_dir, or replace it with "
                "--overwrite true"
            )


def main(argv: Sequence[str] | None = None) -> int | None:
    config = parse_config(TokenizerConfig, argv, description=__doc__)
    train = load_split(config, "train", config.seed)
    require_column(train, config.caption_column, "caption_column")
    validation = load_split(config, "validation", config.seed)
    print(f"Training a {config.model} tokenizer on the captions of {len(train):,} rows.")
    tokenizer = train_tokenizer(
        captions_of(train, config.caption_column),
        model=config.model,
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        lowercase=config.lowercase,
        model_max_length=config.model_max_length,
        length=len(train),
    )
    if len(tokenizer) <= len(SPECIAL_TOKENS):
        raise UserError(
            f"no word in column '{config.caption_column}' occurs {config.min_frequency} times; lower --min_frequency, "
            "or choose another --caption_column"
        )
    seen, name = (validation, "validation") if len(validation) else (train, "training")
    for caption in itertools.islice(captions_of(seen, config.caption_column), EXAMPLES):
        print(round_trip(tokenizer, caption))
    report = report_on(tokenizer, captions_of(seen, config.caption_column))
    print(describe(report, name, tokenizer.model_max_length))
    _save(tokenizer, Path(config.output_dir))
    print(f"The tokenizer ({len(tokenizer):,} entries) is in {config.output_dir}")
    print(f"Train with it: --tokenizer {config.output_dir}")
    return 0


def describe(report: TokenizerReport, name: str, limit: int) -> str:
    """Return the report in sentences."""
    sentences = [
        f"Of {report.words:,} words in {report.captions:,} {name} captions, {report.unknown_share:.2%} are unknown; "
        f"{report.round_trips:,} captions are unchanged after encoding and decoding, apart from normalization.",
        f"The longest caption has {report.longest} tokens"
        + (f"; {report.cut:,} are truncated to {limit} (--model_max_length)." if report.cut else "."),
    ]
    if report.unknown_share > MANY_UNKNOWN:
        sentences.append(
            "That is a lot: try a larger --vocab_size, a lower --min_frequency, or --model bpe (no unknown words)."
        )
    return "\n".join(sentences)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write every file atomically, tokenizer.json last, so that a folder with tokenizer.json is complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            save_tokenizer(tokenizer, Path(temporary))
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "tokenizer.json"):
                write_atomically(folder / file.name, file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another --output_dir") from error


if __name__ == "__main__":
    entry_point(main)
