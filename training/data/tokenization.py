"""Tokenizers for captions, trained from scratch with the `tokenizers` library.

L tokens of a caption, including `<START>` and `<END>`; ids 0 to 3 are the special tokens in every tokenizer made here.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pipelines.tools.checkpoint_links import follow_links_or_name
from pipelines.tools.cli import UserError, located
from pipelines.tools.commands import command
from pipelines.tools.progress import watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, START, END, UNKNOWN = SPECIAL_TOKENS = ("<PAD>", "<START>", "<END>", "<UNK>")
PAD_ID, START_ID, END_ID, UNKNOWN_ID = range(4)
BYTES = 256
# Above this fraction of unknown words, a text encoder misses much of the content of prompts.
MANY_UNKNOWN = 0.05
# Words keep their hyphens and apostrophes ("medium-light", "don't"); every other symbol is a separate word.
_WORD = r"[\p{L}\p{M}\p{N}]+(?:['’-][\p{L}\p{M}\p{N}]+)*|[^\s\p{L}\p{M}\p{N}]"
# With fewer captions, many words of prompts occur in none of them; pieces of these words do.
FEW_CAPTIONS = 5000
_CAPTIONS_PER_CALL = 1000
# The time to train byte-level pieces grows with the square of the longest word: 115 s for one word of 400,000 letters.
LONGEST_WORD = 1000
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD}}}(?=\S)")


@dataclass
class TokenizerReport:
    """Statistics of captions that were encoded and decoded again."""

    captions: int = 0
    words: int = 0
    unknown_words: int = 0
    round_trips: int = 0
    """Number of captions that are decoded without loss, apart from case and spacing"""
    longest: int = 0
    """Number of tokens of the longest caption"""
    cut: int = 0
    """Number of captions longer than the tokenizer's limit"""

    @property
    def unknown_share(self) -> float:
        return self.unknown_words / max(1, self.words)


TokenizerModel = Literal["auto", "word_level", "bpe"]


def smallest_vocabulary(model: TokenizerModel) -> int:
    """Return the minimum vocabulary size: the special tokens, and one word or the alphabet of bytes."""
    return len(SPECIAL_TOKENS) + (BYTES if model == "bpe" else 1)


def empty_vocabulary(model: TokenizerModel) -> int:
    """Return the number of entries of a tokenizer that has learned nothing."""
    return len(SPECIAL_TOKENS) + (BYTES if model == "bpe" else 0)


def train_tokenizer(
    captions: Iterable[str],
    *,
    model: Literal["word_level", "bpe"] = "word_level",
    vocab_size: int = 8000,
    min_frequency: int | None = None,
    lowercase: bool = True,
    model_max_length: int = 77,
    length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on a stream of captions; only the counts are held in memory.

    Args:
        model: "word_level" has whole words, and `<UNK>` for rare ones; "bpe" has byte-level pieces, and no unknown
            words.
        vocab_size: maximum number of entries, including special tokens.
        min_frequency: minimum number of occurrences of a word (or of a pair to merge); None is `usual_frequency`.
        model_max_length: number of tokens L to which captions are truncated.
        length: number of captions, for the progress bar.
    """
    make = _word_level if model == "word_level" else _bpe
    tokenizer, trainer = make(vocab_size, min_frequency or usual_frequency(model))
    from tokenizers import normalizers, processors
    from transformers import PreTrainedTokenizerFast

    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    texts = captions if model == "word_level" else map(_without_long_words, captions)
    tokenizer.train_from_iterator(watched(texts, length, "caption", "captions"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        pair=f"{START} $A {END} $B {END}",
        special_tokens=[(START, START_ID), (END, END_ID)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
    )


def usual_frequency(model: TokenizerModel) -> int:
    """Return the default of the minimum number of occurrences of a word, or of a pair of pieces.

    A pair that occurs once makes a rare word one token. Its pieces are then never trained, although prompts with other
    words consist of them.
    """
    return 2 if model == "bpe" else 1


def train_suitable_tokenizer(
    captions: Callable[[], Iterable[str]],
    held_out: Callable[[], Iterable[str]],
    *,
    model: TokenizerModel = "auto",
    vocab_size: int = 8000,
    **settings: Any,
) -> tuple[PreTrainedTokenizerFast, str]:
    """Train a tokenizer of the kind that suits the captions, and return it with a sentence about the choice.

    With "auto", it has byte-level pieces if there are fewer than `FEW_CAPTIONS` captions, or if more than
    `MANY_UNKNOWN` of the words in held-out captions would be unknown; otherwise it has whole words.

    Args:
        captions, held_out: return the captions to train on, and others, from the beginning at each call.
        settings: see `train_tokenizer`.

    Raises:
        UserError: `captions` yields nothing.
    """
    if next(iter(captions()), None) is None:
        raise UserError("all captions are empty, so that no tokenizer can be trained; choose another --caption_column")
    if model != "auto":
        return train_tokenizer(captions(), model=model, vocab_size=vocab_size, **settings), f"The tokenizer is {model}."
    if vocab_size < smallest_vocabulary("bpe"):
        reason = f"it is word_level, because pieces need at least {smallest_vocabulary('bpe')} entries"
        return train_tokenizer(captions(), vocab_size=vocab_size, **settings), f"Of both kinds of tokenizer, {reason}."
    count = sum(1 for _ in itertools.islice(captions(), FEW_CAPTIONS))
    if count < FEW_CAPTIONS:
        reason = f"there are only {count:,} captions (fewer than {FEW_CAPTIONS:,})"
    else:
        tokenizer = train_tokenizer(captions(), vocab_size=vocab_size, **settings)
        share = report_on(tokenizer, held_out()).unknown_share
        if share <= MANY_UNKNOWN:
            return tokenizer, f"The tokenizer is word_level: {share:.2%} of the words in other captions are unknown."
        reason = f"{share:.2%} of the words in other captions would be unknown with whole words"
    tokenizer = train_tokenizer(captions(), model="bpe", vocab_size=vocab_size, **settings)
    return tokenizer, f"The tokenizer is bpe, because {reason}."


def is_word_level(tokenizer: Any) -> bool:
    """Return whether a tokenizer has whole words, some of which it may not know."""
    return type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel"


def unknown_words_advice(tokenizer: Any, flag: str, *, vocab_size: int, min_frequency: int = 1) -> str:
    """Return what lowers the share of unknown words: only what can have an effect on this tokenizer.

    Args:
        flag: flag that chooses the kind of the tokenizer.
        vocab_size, min_frequency: settings that it was trained with.
    """
    advice = [f"use {flag} bpe, which has no unknown words"] if is_word_level(tokenizer) else []
    if min_frequency > 1:
        advice.append(f"lower --min_frequency, which is {min_frequency}")
    if len(tokenizer) >= vocab_size:
        advice.append(f"raise --vocab_size, because all {vocab_size:,} entries are used")
    return ", or ".join(advice)


def _without_long_words(caption: str) -> str:
    """Return the caption with spaces inside words of more than `LONGEST_WORD` characters, such as base64 text."""
    return _LONG_WORD.sub(lambda match: f"{match[0]} ", caption)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder that `AutoTokenizer.from_pretrained` loads, in Transformers 4 as well as 5."""
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # Transformers 5 writes TokenizersBackend, its new name for the class, which 4 does not know.
    settings = {**json.loads(config.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def report_on(tokenizer: PreTrainedTokenizerFast, captions: Iterable[str]) -> TokenizerReport:
    """Encode and decode `captions` and count what is lost."""
    report = TokenizerReport()
    for batch in _batches(captions):
        encoded = tokenizer(batch, add_special_tokens=False, truncation=False, verbose=False).input_ids
        for caption, ids in zip(batch, encoded, strict=True):
            length = len(ids) + 2  # between <START> and <END>
            report.captions += 1
            report.words += len(ids)
            report.unknown_words += ids.count(tokenizer.unk_token_id)
            report.longest = max(report.longest, length)
            report.cut += length > tokenizer.model_max_length
            report.round_trips += decode(tokenizer, ids) == normalized(tokenizer, caption)
    return report


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Convert token ids to text, without special tokens except `<UNK>` for unknown words."""
    ends = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    kept = [i for i in ids if i not in ends]
    return " ".join(tokenizer.decode(kept).split())


def normalized(tokenizer: PreTrainedTokenizerFast, caption: str) -> str:
    """Return the text that `caption` should be decoded to: normalized by the tokenizer, with single spaces."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return " ".join((normalizer.normalize_str(caption) if normalizer else caption).split())


def round_trip(tokenizer: PreTrainedTokenizerFast, caption: str) -> str:
    """Format a caption, its ids and the text that they are decoded to, for reading."""
    ids = tokenizer(caption, truncation=True).input_ids
    unknown = ids.count(tokenizer.unk_token_id)
    ending = f"   ({unknown} unknown)" if unknown else ""
    return f"  {caption!r}\n    -> {ids}\n    -> {decode(tokenizer, ids)!r}{ending}"


def _word_level(vocab_size: int, min_frequency: int) -> tuple[Any, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    # Joins words with spaces and removes the spaces before commas and full stops; no word begins with the prefix.
    tokenizer.decoder = decoders.WordPiece(prefix="\0", cleanup=True)
    return tokenizer, trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )


def _bpe(vocab_size: int, min_frequency: int) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _batches(captions: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for caption in captions:
        batch.append(caption)
        if len(batch) == _CAPTIONS_PER_CALL:
            yield batch
            batch = []
    if batch:
        yield batch


MAX_CACHED_CAPTIONS = 100_000


def load_tokenizer(name_or_path: str) -> Any:
    """Load a tokenizer. Raises UserError if it cannot be loaded or has no padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(follow_links_or_name(name_or_path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer {located(name_or_path)} cannot be loaded ({str(error).splitlines()[0]}); check "
            f"--tokenizer, or make one with {command('data_scripts/train_tokenizer.py')}"
        ) from None
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer '{name_or_path}' has no padding token; set one and save it again")
    return tokenizer


class CaptionTokens:
    """Tokenizes captions in the data loader; each caption is tokenized once and cached.

    Args:
        tokenizer: a tokenizer with a padding token.
        max_length: maximum number of tokens L of a caption.
        padding: "max_length" pads every caption to `max_length` ids, as LatentDiffusionPipeline does; "longest" pads to
            the longest caption of the batch and adds a mask, as ImageCaptionPipeline does.
    """

    def __init__(self, tokenizer: Any, max_length: int, padding: Literal["max_length", "longest"]):
        self.tokenizer, self.max_length, self.padding = tokenizer, max_length, padding
        self._known: dict[str, Any] = {}

    def __call__(self, captions: Sequence[str]) -> dict[str, Any]:
        """Return `input_ids` (B L, int64) of B captions; with padding "longest", also `attention_mask` (B L, int64), 1
        for tokens and 0 for padding, and `has_padding`, whether there is a 0."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if len(self._known) + len(new) > MAX_CACHED_CAPTIONS:
            self._known.clear()
            new = list(dict.fromkeys(captions))
        if new:
            self._known |= zip(new, self._tokenize(new), strict=True)
        ids = [self._known[caption] for caption in captions]
        if self.padding == "max_length":
            return {"input_ids": torch.stack(ids)}
        from pipelines.image_caption import padded_ids

        input_ids, attention_mask = padded_ids(ids, self.tokenizer.pad_token_id)
        has_padding = not bool(attention_mask.all())
        return {"input_ids": input_ids, "attention_mask": attention_mask, "has_padding": has_padding}

    def _tokenize(self, captions: Sequence[str]) -> Any:
        if self.padding == "max_length":
            from pipelines.latent_diffusion import tokenize_captions

            return tokenize_captions(self.tokenizer, captions, self.max_length)
        from pipelines.image_caption import caption_ids

        return caption_ids(self.tokenizer, captions, self.max_length)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}  # each worker fills a cache of its own
