"""The U-Net's condition for a batch: a dropped condition is the empty caption and the null class, for each sample."""

from __future__ import annotations

import pytest
import torch

from pipelines.latent_diffusion import encode_captions, null_class, tokenize_captions
from tests.support.tiny_models import TOKENS, tiny_text_encoder, tiny_tokenizer, tiny_unet
from training.data.tokenization import CaptionTokens
from training.models.conditioning import caption_and_class

CAPTIONS = ["a red poster", "a poster of blue circles", "", "red red red red red red red red red red"]


@pytest.mark.parametrize("dropped", [[False] * 4, [True, False, False, True], [True] * 4])
def test_dropped_samples_have_the_condition_of_no_prompt(dropped: list[bool]):
    tokens = CaptionTokens(tiny_tokenizer(), TOKENS, "max_length")
    unet, encoder = tiny_unet(classes=3), tiny_text_encoder()
    batch = {**tokens(CAPTIONS), "label": torch.tensor([0, 1, 2, 1])}
    arguments = caption_and_class(unet, encoder, tokens([""])["input_ids"], batch, torch.tensor(dropped))
    captions = ["" if drop else caption for caption, drop in zip(CAPTIONS, dropped)]
    expected = encode_captions(encoder, tokenize_captions(tiny_tokenizer(), captions, TOKENS))
    assert torch.equal(arguments["encoder_hidden_states"], expected)
    labels = [null_class(unet) if drop else label for label, drop in zip([0, 1, 2, 1], dropped)]
    assert arguments["class_labels"].tolist() == labels


def test_a_model_without_text_and_classes_has_no_condition():
    assert caption_and_class(tiny_unet(text=False), None, None, {}, torch.tensor([True])) == {
        "encoder_hidden_states": None
    }
