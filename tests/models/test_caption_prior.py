"""Regression from captions to latents: it learns conditional means from words and their order, and is reproducible."""

from __future__ import annotations

import pytest
import torch

from pipelines.latent_diffusion import encode_captions, tokenize_captions
from pipelines.models.caption_prior import CaptionPrior
from pipelines.tools.cli import UserError
from tests.support.tiny_models import tiny_tokenizer
from training.models.caption_prior import CaptionPriorConfig, warm_up
from training.models.text_encoder import TextEncoderConfig, new_text_encoder
from training.train_latent_diffusion import Config

WIDTH = 32
CONFIG = CaptionPriorConfig(hidden_size=64, warmup_steps=200, warmup_batch_size=32, dropout=0.0)


def parts(seed: int = 0):
    torch.manual_seed(seed)
    encoder = TextEncoderConfig(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, max_length=8)
    return CaptionPrior(WIDTH, 1, 2, 2, hidden_size=64, dropout=0.0), new_text_encoder(encoder, tiny_tokenizer())


def predict(prior, encoder, captions: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return prior(encode_captions(encoder, tokenize_captions(tiny_tokenizer(), captions, 8)))


def test_conditional_means_depend_on_words_and_their_order():
    means = {"red of blue": -1.0, "blue of red": 1.0, "a poster": 0.25}
    captions = list(means) * 40
    torch.manual_seed(1)
    latents = torch.tensor([means[c] for c in captions])[:, None, None, None] + 0.2 * torch.randn(120, 1, 2, 2)
    prior, encoder = parts()
    warm_up(prior, encoder, tokenize_captions(tiny_tokenizer(), captions, 8), latents, CONFIG, seed=0)
    for caption, predicted in zip(means, predict(prior, encoder, list(means)), strict=True):
        own = latents[[i for i, c in enumerate(captions) if c == caption]].mean(0)
        assert (predicted - own).abs().max() < 0.1, caption


def test_the_same_seed_gives_the_same_weights():
    ids, latents = tokenize_captions(tiny_tokenizer(), ["a red poster", "blue"], 8), torch.randn(2, 1, 2, 2)
    weights = []
    for seed in (0, 0, 1):
        prior, encoder = parts()
        short = CaptionPriorConfig(hidden_size=64, warmup_steps=5, warmup_batch_size=3)
        warm_up(prior, encoder, ids, latents, short, seed)
        weights.append(torch.cat([p.detach().flatten() for m in (prior, encoder) for p in m.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_frozen_text_encoder_is_not_changed():
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


def test_the_prior_needs_captions():
    config = Config(
        vae="vae", condition_on=["label"], caption_prior=CaptionPriorConfig(hidden_size=8), report_to="none"
    )
    with pytest.raises(UserError, match="needs captions"):
        config.validate()
