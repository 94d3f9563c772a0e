"""ImageCaptionModel: causal, independent of padding, with exact caching; its objectives in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from transformers import masking_utils

from pipelines.models.image_caption_model import ImageCaptionModel, LatentPosterior
from pipelines.models.latent_prior import LatentPriorModel
from tests.support.tiny_captions import MODEL, RESOLUTION, tiny_caption_model
from training.benchmarks.captions import loop_of_forwards
from training.core.draws import Draws
from training.models.attention import one_sequence_per_row
from training.models.image_caption import ImageCaptionModelConfig
from training.models.latent_prior import LatentPriorConfig, LatentPriorPhase
from training.objectives.captions import (
    contrastive_losses,
    cosine_distances,
    same_captions,
    same_images,
    scaled_errors,
    token_losses,
    with_unknown_words,
)

IDS = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 9, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


@pytest.fixture(scope="module")
def model() -> ImageCaptionModel:
    return tiny_caption_model()


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_default_has_about_108_million_parameters():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ImageCaptionModel().parameters())
    assert 107e6 < parameters < 109e6


def test_the_defaults_of_model_and_flags_are_the_same():
    own = ImageCaptionModelConfig()
    with torch.device("meta"):
        config: FrozenDict = ImageCaptionModel().config
    assert {name: getattr(own, name) for name in MODEL} == {
        name: list(config[name]) if isinstance(config[name], tuple) else config[name] for name in MODEL
    }
    assert (config.sample_size, config.vocab_size) == (256, 8000)


def test_posterior_means_lie_on_the_sphere_and_can_be_decoded(model):
    image, caption = model(images(), IDS, MASK)
    for posterior in (image, caption):
        assert posterior.mean.shape == posterior.logvar.shape == (2, MODEL["latent_size"])
        assert torch.allclose(posterior.mean.square().mean(1), torch.ones(2), atol=1e-5)
        assert posterior.logvar.mean() < -3
    assert model.decode_image(caption.mean).shape == (2, 3, RESOLUTION, RESOLUTION)
    assert model.caption_logits(image.mean, IDS).shape == (2, 5, model.config.vocab_size)


def test_samples_have_the_moments_of_the_posterior():
    posterior = LatentPosterior(torch.tensor([[2.0]]), torch.tensor([[math.log(9.0)]]))
    drawn = posterior.sample(torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)))
    assert abs(float(drawn.mean()) - 2) < 0.1
    assert abs(float(drawn.std()) - 3) < 0.1


def test_the_caption_decoder_is_causal(model):
    """A token changes the logits from its position on, and none before."""
    latents = torch.randn(2, MODEL["latent_size"], generator=torch.Generator().manual_seed(2))
    changed = IDS.clone()
    changed[:, 3] = 10
    before, after = (model.caption_logits(latents, ids) for ids in (IDS, changed))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_the_latent_changes_the_caption(model):
    latents = torch.randn(2, MODEL["latent_size"], generator=torch.Generator().manual_seed(2))
    logits = model.caption_logits(latents, IDS[:1].expand(2, -1))
    assert not torch.allclose(logits[0, 0], logits[1, 0], atol=1e-4)


def test_padding_changes_no_latent(model):
    alone = model.encode_caption(IDS[1:, :4], MASK[1:, :4]).mean
    padded = IDS.masked_fill(MASK == 0, 7)
    assert torch.allclose(model.encode_caption(padded, MASK).mean[1:], alone, atol=1e-5)
    assert not torch.allclose(model.encode_caption(padded, torch.ones_like(MASK)).mean[1:], alone, atol=1e-3)


def test_a_caption_encoder_that_knows_about_padding_gives_the_same_bits():
    """Transformers reads the mask to find that out, and a GPU would have to be waited for."""
    model = tiny_caption_model()
    model.train()  # as in training
    for mask in (MASK, torch.ones_like(MASK)):
        posteriors = []
        for known in (None, bool((mask == 0).any())):
            torch.manual_seed(0)
            posteriors.append(model.encode_caption(IDS, mask, known))
        assert torch.equal(posteriors[0].mean, posteriors[1].mean)
        assert torch.equal(posteriors[0].logvar, posteriors[1].logvar)


def test_decoders_that_are_told_of_one_sequence_per_row_give_the_same_bits():
    model, find = tiny_caption_model(), masking_utils.find_packed_sequence_indices
    latents = torch.randn(len(IDS), model.config.latent_size, generator=torch.Generator().manual_seed(0))
    before = model.caption_logits(latents, IDS)
    with one_sequence_per_row():
        assert torch.equal(model.caption_logits(latents, IDS), before)
    assert masking_utils.find_packed_sequence_indices is find


@pytest.mark.parametrize("batch", [1, 3])
def test_cached_generation_equals_a_loop_of_full_forwards(batch):
    """The tokens are equal for greedy decoding over the whole length, in float64."""
    model = tiny_caption_model(seed=3).double()
    # With larger weights than new ones, every token depends on the latent and on all tokens before it.
    for parameter in model.caption_decoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    latents = torch.randn(batch, MODEL["latent_size"], generator=torch.Generator().manual_seed(4)).double()
    tokens = MODEL["max_length"] - 1
    cached = model.generate_captions(latents, min_length=tokens + 1)
    full = loop_of_forwards(model, latents, tokens, (0, 1, 2, 3))
    assert torch.equal(cached, full)
    assert len({tuple(row) for row in full.tolist()}) == batch
    assert len(set(full[0].tolist())) > 2


def test_generation_uses_the_cache(model):
    """Every forward pass after the first gets one token."""
    seen = []
    first_layer = model.caption_decoder.body.transformer.h[0]
    hook = first_layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[1]))
    try:
        model.generate_captions(torch.randn(2, MODEL["latent_size"]), min_length=6, max_length=6)
    finally:
        hook.remove()
    assert seen == [MODEL["prefix_length"] + 1, 1, 1, 1, 1]


def test_generation_stops_at_end_and_never_contains_padding_start_or_unknown(model):
    with torch.no_grad():
        model = tiny_caption_model()
        model.caption_decoder.body.lm_head.weight[[0, 1, 3]] *= 1e3
        ids = model.generate_captions(torch.randn(8, MODEL["latent_size"], generator=torch.Generator().manual_seed(0)))
    for row in ids.tolist():
        words = row[: row.index(2)] if 2 in row else row
        assert not {0, 1, 3} & set(words)
        assert set(row[len(words) + 1 :]) <= {0}


def test_beam_search_is_at_least_as_likely_as_greedy_decoding():
    model = tiny_caption_model(seed=6).double()
    for parameter in model.caption_decoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    latents = torch.randn(16, MODEL["latent_size"], generator=torch.Generator().manual_seed(7)).double()

    def log_likelihoods(ids: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([torch.ones(16, 1, dtype=torch.long), ids], 1)
        logits = model.caption_logits(latents, whole)[:, :-1].clone()
        logits[..., :4] = float("-inf")  # including <END>, which is not allowed before the minimum length
        return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0].sum(1)

    lengths = {"min_length": 5, "max_length": 5}
    with torch.no_grad():
        greedy, beams = (model.generate_captions(latents, num_beams=n, **lengths) for n in (1, 8))
        of_beams, of_greedy = log_likelihoods(beams), log_likelihoods(greedy)
    assert (of_beams >= of_greedy - 1e-9).all()
    assert (of_beams > of_greedy + 1e-6).any()


def test_a_saved_and_loaded_model_gives_the_same_output(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ImageCaptionModel.from_pretrained(tmp_path).eval()
    for own, other in zip(model(images(), IDS, MASK), loaded(images(), IDS, MASK)):
        assert torch.allclose(own.mean, other.mean, atol=1e-6)
    latents = torch.randn(1, MODEL["latent_size"])
    for own, other in zip(*((m.caption_logits(latents, IDS[:1]), m.decode_image(latents)) for m in (model, loaded))):
        assert torch.allclose(own, other, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_caption_model().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        image, caption = model(images(), IDS, MASK)
        loss = model.decode_image(caption.mean).square().mean() + model.caption_logits(image.mean, IDS).square().mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(g, gradients[1][name], atol=1e-6) for name, g in gradients[0].items())


def test_a_side_that_is_not_a_multiple_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        tiny_caption_model(sample_size=30)


# --- objectives


def test_token_losses_in_closed_form():
    """Uniform logits cost log V for each token but <START>; ids and logits of padding do not matter."""
    logits = torch.zeros(2, 5, 11)
    logits[1, 3:] = torch.randn(2, 11)  # predictions after <END>
    sums, counts = token_losses(logits, IDS, MASK)
    assert counts.tolist() == [4, 3]
    assert torch.allclose(sums, counts * math.log(11))
    sure = torch.full((2, 5, 11), -100.0).scatter(2, IDS.roll(-1, 1)[..., None], 100.0)
    assert torch.allclose(token_losses(sure, IDS, MASK)[0], torch.zeros(2), atol=1e-5)


def test_padding_with_the_id_of_the_end_is_distinguished_by_the_mask():
    """Some tokenizers pad with their end token: only the tokens in the mask count, and the end is one of them."""
    ids = torch.tensor([[1, 5, 2, 2, 2]])
    assert token_losses(torch.zeros(1, 5, 11), ids, torch.tensor([[1, 1, 1, 0, 0]]))[1].item() == 2


def test_contrastive_losses_in_closed_form():
    eye = torch.eye(3)
    none = torch.eye(3, dtype=torch.bool)
    expected = math.log(math.exp(2.0) + 2) - 2.0
    assert torch.allclose(contrastive_losses(eye, 5 * eye, torch.tensor(2.0), none), torch.full((3,), expected))
    alike = contrastive_losses(torch.ones(3, 4), torch.ones(3, 4), torch.tensor(7.0), none)
    assert torch.allclose(alike, torch.full((3,), math.log(3)))


def test_rows_with_equal_captions_are_not_negatives():
    same = same_captions(torch.tensor([[1, 5, 2], [1, 5, 2], [1, 6, 2]]), torch.ones(3, 3))
    assert same.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    losses = contrastive_losses(torch.ones(3, 4), torch.ones(3, 4), torch.tensor(1.0), same)
    assert torch.allclose(losses, torch.tensor([math.log(2), math.log(2), math.log(3)]))
    # Captions are compared without their padding.
    ids, mask = torch.tensor([[1, 2, 9], [1, 2, 0]]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert same_captions(ids, mask).all()


def test_rows_with_equal_images_are_recognized_by_their_pixels():
    images = torch.rand(4, 3, 16, 16)
    images[2] = images[0]
    images[3] = images[1]
    images[3, 2, 15, 15] += 1 / 127
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = True
    assert torch.equal(same_images(images), expected)


def test_the_contrastive_loss_is_exact_under_autocast():
    image = torch.nn.functional.normalize(torch.randn(16, 32), dim=1)
    caption = image + 0.05 * torch.randn(16, 32)
    same = torch.eye(16, dtype=torch.bool)
    exact = contrastive_losses(image, caption, torch.tensor(100.0), same)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(contrastive_losses(image, caption, torch.tensor(100.0), same), exact, atol=1e-5)


def test_unknown_words_replace_neither_ends_nor_padding():
    everything = torch.ones(2, 9, dtype=torch.bool)
    expected = torch.tensor([[1, 3, 3, 3, 2], [1, 3, 3, 2, 0]])
    assert torch.equal(with_unknown_words(IDS, MASK, everything, 3), expected)
    one = torch.zeros(2, 9, dtype=torch.bool)
    one[0, 2] = one[1, 3] = one[1, 4] = True
    assert with_unknown_words(IDS, MASK, one, 3).tolist() == [[1, 5, 3, 7, 2], [1, 8, 9, 2, 0]]


def test_cosine_distances_and_scaled_errors():
    one, other = torch.tensor([[1.0, 0], [1, 0], [1, 0]]), torch.tensor([[2.0, 0], [0, 3], [-1, 0]])
    assert torch.allclose(cosine_distances(one, other), torch.tensor([0.0, 1.0, 2.0]))
    assert torch.allclose(
        scaled_errors(torch.ones(2, 3, 4, 4), -torch.ones(2, 3, 4, 4), torch.tensor(8.0)), torch.full((2,), 0.5)
    )


def test_the_similarity_scale_is_capped():
    model = tiny_caption_model()
    assert model.similarity_scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.logit_scale.fill_(20.0)
    scale = model.similarity_scale()
    assert scale.item() == pytest.approx(100.0)
    scale.backward()
    assert float(model.logit_scale.grad) == pytest.approx(100.0)  # without a gradient it could never decrease


# --- the prior


def test_the_prior_learns_a_distribution():
    """The data are two points in four dimensions; about half of the samples are near each of them."""
    from pipelines.common.sampling import denoise
    from pipelines.common.schedulers import sampling_scheduler, training_scheduler

    torch.manual_seed(0)
    points = torch.tensor([[1.0, -1, 1, -1], [-1, 1, 1, 1]])
    prior = LatentPriorModel(4, 64, 2)
    phase = LatentPriorPhase(prior, LatentPriorConfig(repeats=4), lambda batch, draws: points.repeat(16, 1))
    optimizer = torch.optim.Adam(prior.parameters(), 2e-3)
    losses = []
    for step in range(500):
        loss, _ = phase({}, Draws(0, step, range(32)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-50:]) < 0.5 * sum(losses[:10]) * 5
    scheduler = sampling_scheduler(training_scheduler("flow_prediction"))
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))

    class NoBar:
        def __init__(self, total): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def update(self): ...

    with torch.no_grad():
        samples = denoise(
            scheduler, lambda x, t: prior(x, t.reshape(1).expand(len(x))), noise, {"num_inference_steps": 30}, None,
            NoBar, lambda step, t, x: (x, False),
        )  # fmt: skip
    distances = torch.cdist(samples, points)
    assert (distances.min(1).values < 0.5).float().mean() > 0.9
    assert 0.25 < (distances.argmin(1) == 0).float().mean() < 0.75


def test_noise_levels_differ_between_repeats_but_not_between_calls():
    phase = LatentPriorPhase(LatentPriorModel(4, 8, 1), LatentPriorConfig(), lambda batch, draws: torch.ones(2, 4))
    draws = Draws(0, 3, range(2))
    one, again, four = (phase.losses(torch.ones(2, 4), draws, repeats) for repeats in (1, 1, 4))
    assert torch.equal(one, again)
    assert not torch.allclose(one, four)
