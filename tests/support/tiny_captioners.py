"""Tiny models of Transformers that caption images, saved as their libraries save them, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.support.tiny_captions import caption

WORDS = sorted({word for i in range(24) for word in caption(i).replace(",", "").split()})
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<image>"]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS, "what", "is", "this"])}
PAD, CLS, SEP, IMAGE = (VOCABULARY[name] for name in ("[PAD]", "[CLS]", "[SEP]", "<image>"))
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": CLS,
    "pad_token_id": PAD,
    "eos_token_id": SEP,
    "sep_token_id": SEP,
}
SIZE = {"height": 16, "width": 16}
CHAT = (
    "{% for m in messages %}{% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else ' ' + c.text }}"
    "{% endfor %}{% endfor %}"
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", CLS), ("[SEP]", SEP)])
    return transformers.BertTokenizer(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model larger weights, so that its captions depend on the image."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.7)
    return model


def save_blip(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config={**TEXT, "encoder_hidden_size": 16}, vision_config=VISION)
    model = _spread(transformers.BlipForConditionalGeneration(config))
    torch.nn.init.constant_(model.text_decoder.cls.predictions.bias[: len(SPECIAL)], -100)  # no caption is empty
    model.save_pretrained(folder)
    transformers.BlipProcessor(transformers.BlipImageProcessor(size=SIZE), tokenizer()).save_pretrained(folder)
    return folder


def save_git(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GitConfig(vision_config=VISION, **TEXT)
    _spread(transformers.GitForCausalLM(config)).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE)
    transformers.GitProcessor(images, tokenizer()).save_pretrained(folder)
    return folder


def save_encoder_decoder(folder: Path) -> Path:
    torch.manual_seed(0)
    decoder = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), decoder
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = CLS, PAD, SEP
    _spread(transformers.VisionEncoderDecoderModel(config)).save_pretrained(folder)
    transformers.ViTImageProcessor(size=SIZE).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    """Save a model that answers a question about an image, with a chat template."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**{**TEXT, "num_key_value_heads": 2})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    _spread(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE)
    transformers.LlavaProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_classifier(folder: Path) -> Path:
    """Save a model that does not caption images."""
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(folder)
    return folder
