"""Captions as token ids, and as the text condition of a network. Training and sampling use the same functions.

Shapes: B captions, L tokens, D text width.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def max_caption_length(tokenizer: PreTrainedTokenizerBase, text_encoder: Any) -> int:
    """Return L, the maximum number of tokens that both the tokenizer and the text encoder's positions allow.

    Raises:
        ValueError: If neither sets a limit, as with T5; `max_text_length` must then be given.
    """
    limits = (tokenizer.model_max_length, getattr(text_encoder.config, "max_position_embeddings", None))
    # `model_max_length` of a tokenizer without a limit is 1e30.
    known = [int(limit) for limit in limits if limit is not None and limit < 100_000]
    if not known:
        raise ValueError("neither the tokenizer nor the text encoder limits a caption's length; pass `max_text_length`")
    return min(known)


def tokenize_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int) -> Tensor:
    """Tokenize captions to ids (B L, int64), padded and truncated to `max_length` = L.

    Raises:
        ValueError: If the tokenizer has no pad token.
    """
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no pad token; set one, such as `tokenizer.pad_token = '<PAD>'`"
        )
    return tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
    ).input_ids


def encode_captions(text_encoder: Any, input_ids: Tensor) -> Tensor:
    """Encode token ids (B L, on the encoder's device) to the text condition (B L D), the last hidden state.

    No attention mask is used, as in Stable Diffusion: the network attends to the pad tokens as well.
    """
    return text_encoder(input_ids=input_ids).last_hidden_state
