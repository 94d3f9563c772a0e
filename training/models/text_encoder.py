"""Tokenizers and text encoders for captions: a small encoder trained jointly, or a frozen pretrained one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipelines.tools.checkpoint_links import follow_links_or_name
from pipelines.tools.cli import UserError, located
from training.core.checks import check_multiple
from training.core.options import Options, option
from training.data.tokenization import CaptionTokens, load_tokenizer

WORD_STD, POSITION_STD = 1.0, 0.2  # standard deviations of new embeddings


@dataclass
class TextEncoderConfig(Options):
    """Architecture of the jointly trained text encoder; the names are those of transformers.CLIPTextConfig."""

    hidden_size: int = option(128, at_least=1)
    """Size of the hidden states"""
    num_hidden_layers: int = option(2, at_least=1)
    """Number of Transformer layers"""
    num_attention_heads: int = option(4, at_least=1)
    """Number of attention heads"""
    max_length: int = option(32, at_least=3)
    """Maximum number of tokens per caption, including its start and end tokens; longer captions are truncated. It
    also applies to --pretrained_text_encoder"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        check_multiple(
            f"{prefix}hidden_size", self.hidden_size, f"{prefix}num_attention_heads", self.num_attention_heads
        )


def build_text(
    config: TextEncoderConfig, tokenizer_name: str | None, pretrained: str | None
) -> tuple[CaptionTokens | None, Any]:
    """Return the caption tokenizer and the text encoder; both are None if neither is named.

    Args:
        config: architecture of a new text encoder, whose weights are drawn from the global generator.
        tokenizer_name: a tokenizer's folder or name; None takes the tokenizer of the pretrained text encoder.
        pretrained: a text encoder of Transformers by name or folder; None builds a new one.

    Raises:
        UserError: one of them cannot be loaded, or they do not belong together.
    """
    from pipelines.latent_diffusion import max_caption_length

    if not (tokenizer_name or pretrained):
        return None, None
    tokenizer = load_tokenizer(tokenizer_name or pretrained or "")
    text_encoder = load_text_encoder(pretrained) if pretrained else new_text_encoder(config, tokenizer)
    check_vocabulary(tokenizer, text_encoder)
    max_length = config.max_length
    with contextlib.suppress(ValueError):  # raised if neither of them has a maximum length
        max_length = min(max_length, max_caption_length(tokenizer, text_encoder))
    return CaptionTokens(tokenizer, max_length, padding="max_length"), text_encoder


def new_text_encoder(config: TextEncoderConfig, tokenizer: Any) -> Any:
    """Build a CLIPTextModel with new weights for this tokenizer's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            projection_dim=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # With CLIP's standard deviation of 0.02, the first layers add far more than the word embeddings hold, and words
    # can be distinguished only after thousands of steps.
    nn.init.normal_(encoder.get_input_embeddings().weight, std=WORD_STD)
    positions = [p for name, p in encoder.named_parameters() if name.endswith("position_embedding.weight")]
    nn.init.normal_(positions[0], std=POSITION_STD)
    return encoder


def load_text_encoder(name_or_path: str) -> Any:
    """Load a pretrained text encoder: CLIP's text model, T5's encoder, or an AutoModel with a last hidden state.

    Raises:
        UserError: it cannot be loaded.
    """
    import transformers

    name_or_path = follow_links_or_name(name_or_path)
    try:
        kind = transformers.AutoConfig.from_pretrained(name_or_path).model_type
        classes = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
        model_class = getattr(transformers, classes.get(kind, "AutoModel"))
        return model_class.from_pretrained(name_or_path, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the text encoder {located(name_or_path)} cannot be loaded ({str(error).splitlines()[0]}); "
            "check --pretrained_text_encoder"
        ) from None


def check_vocabulary(tokenizer: Any, text_encoder: Any) -> None:
    """Raise UserError if the tokenizer has ids for which the text encoder has no embedding."""
    size = text_encoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the text encoder has embeddings for {size}; "
            "choose a --tokenizer that belongs to --pretrained_text_encoder"
        )
