"""Tokenizers and text encoders for captions: a small one trained jointly, or a pretrained one kept frozen."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipelines.tools.cli import UserError
from training.core.checks import check_multiple
from training.core.options import Options, option
from training.data.tokenization import CaptionTokens, load_tokenizer

WORD_STD, POSITION_STD = 1.0, 0.2


@dataclass
class TextEncoderConfig(Options):
    """The text encoder that is trained jointly; names are those of transformers.CLIPTextConfig."""

    hidden_size: int = option(128, at_least=1)
    """Width D of a token"""
    num_hidden_layers: int = option(2, at_least=1)
    """Transformer layers"""
    num_attention_heads: int = option(4, at_least=1)
    """Attention heads"""
    max_length: int = option(32, at_least=3)
    """Tokens per caption, its start and end included; longer captions are cut"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        check_multiple(
            f"{prefix}hidden_size", self.hidden_size, f"{prefix}num_attention_heads", self.num_attention_heads
        )


def build_text(
    config: TextEncoderConfig, tokenizer_name: str | None, pretrained: str | None
) -> tuple[CaptionTokens | None, Any]:
    """Token ids of captions, and the text encoder that reads them; both None where neither is named.

    Args:
        config: of a text encoder with fresh weights, for which the global generator is used.
        tokenizer_name: a tokenizer's folder or name; None takes the pretrained text encoder's own.
        pretrained: a text encoder of Transformers by name or folder; None makes a new one.

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
    with contextlib.suppress(ValueError):  # neither has a limit of its own
        max_length = min(max_length, max_caption_length(tokenizer, text_encoder))
    return CaptionTokens(tokenizer, max_length, padding="max_length"), text_encoder


def new_text_encoder(config: TextEncoderConfig, tokenizer: Any) -> Any:
    """A CLIPTextModel with fresh weights for this tokenizer's vocabulary."""
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
    # At CLIP's own 0.02 words are drowned by what the first layers add, and told apart only after thousands of steps.
    nn.init.normal_(encoder.get_input_embeddings().weight, std=WORD_STD)
    positions = [p for name, p in encoder.named_parameters() if name.endswith("position_embedding.weight")]
    nn.init.normal_(positions[0], std=POSITION_STD)
    return encoder


def load_text_encoder(name_or_path: str) -> Any:
    """A pretrained text encoder: CLIP's text half, T5's encoder, or whatever AutoModel gives with a last hidden state.

    Raises:
        UserError: it cannot be loaded.
    """
    import transformers

    try:
        kind = transformers.AutoConfig.from_pretrained(name_or_path).model_type
        classes = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
        model_class = getattr(transformers, classes.get(kind, "AutoModel"))
        return model_class.from_pretrained(name_or_path).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the text encoder '{name_or_path}' cannot be loaded ({str(error).splitlines()[0]}); "
            "check --pretrained_text_encoder"
        ) from None


def check_vocabulary(tokenizer: Any, text_encoder: Any) -> None:
    """Raises UserError when the tokenizer has ids that the text encoder has no embedding for."""
    size = text_encoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the text encoder embeds {size}; "
            "--tokenizer and --pretrained_text_encoder do not belong together"
        )
