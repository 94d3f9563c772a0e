"""Regression from captions to latents: it finds conditional means, by words and by their order, and repeats itself."""

from __future__ import annotations

import pytest
import torch

from pipelines.latent_diffusion import encode_captions, tokenize_captions
from pipelines.models.caption_prior import CaptionPrior
from pipelines.tools.cli import UserError
from tests.support.tiny_models import tiny_tokenizer
from training import train_latent_diffusion
from training.models.caption_prior import CaptionPriorConfig, warm_up
from training.models.text_encoder import TextEncoderConfig, new_text_encoder

WIDTH = 32
CONFIG = CaptionPriorConfig(hidden_size=64, warmup_steps=200, warmup_batch_size=32, dropout=0.0)


def parts(seed: int = 0):
    torch.manual_seed(seed)
    encoder = TextEncoderConfig(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, max_length=8)
    return CaptionPrior(WIDTH, 1, 2, 2, hidden_size=64, dropout=0.0), new_text_encoder(encoder, tiny_tokenizer())


def expected(prior, encoder, captions: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return prior(encode_captions(encoder, tokenize_captions(tiny_tokenizer(), captions, 8)))


def test_conditional_means_by_words_and_by_their_order():
    means = {"red of blue": -1.0, "blue of red": 1.0, "a poster": 0.25}
    captions = list(means) * 40
    torch.manual_seed(1)
    latents = torch.tensor([means[c] for c in captions])[:, None, None, None] + 0.2 * torch.randn(120, 1, 2, 2)
    prior, encoder = parts()
    warm_up(prior, encoder, tokenize_captions(tiny_tokenizer(), captions, 8), latents, CONFIG, seed=0)
    for caption, found in zip(means, expected(prior, encoder, list(means)), strict=True):
        own = latents[[i for i, c in enumerate(captions) if c == caption]].mean(0)
        assert (found - own).abs().max() < 0.1, caption


def test_the_same_seed_gives_the_same_weights():
    ids, latents = tokenize_captions(tiny_tokenizer(), ["a red poster", "blue"], 8), torch.randn(2, 1, 2, 2)
    found = []
    for seed in (0, 0, 1):
        prior, encoder = parts()
        short = CaptionPriorConfig(hidden_size=64, warmup_steps=5, warmup_batch_size=3)
        warm_up(prior, encoder, ids, latents, short, seed)
        found.append(torch.cat([p.detach().flatten() for m in (prior, encoder) for p in m.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_frozen_text_encoder_stays_as_it_is():
    prior, encoder = parts()
    encoder.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    ids = tokenize_captions(tiny_tokenizer(), ["a red poster", "blue"], 8)
    warm_up(prior, encoder, ids, torch.randn(2, 1, 2, 2), CONFIG, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": 8, "dropout": 1.0}, "dropout is 1.0"),
        ({"hidden_size": 8, "warmup_batch_size": 0}, "warmup_batch_size is 0"),
    ],
)
def test_impossible_values(settings, message):
    with pytest.raises(UserError, match=message):
        CaptionPriorConfig(**settings).validate()


def test_it_needs_captions():
    with pytest.raises(UserError, match="needs captions"):
        train_latent_diffusion.Config(
            vae="unused", condition_on=["label"], caption_prior=CaptionPriorConfig(hidden_size=8)
        ).validate()
