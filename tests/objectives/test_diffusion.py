"""Noise levels, timesteps and targets of all configurations, compared with closed forms."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from pipelines.tools.cli import UserError
from training.core.draws import NEWEST, Draws, GroupedDraws
from training.core.layout import BatchLayout
from training.engine.step_draws import StepDraws
from training.objectives.diffusion import (
    BETA_SCHEDULES,
    NOISE_BANDS,
    Diffusion,
    DiffusionConfig,
    NoisyBatch,
    noise_level_metrics,
    noise_level_sums,
)
from training.objectives.functional import PREDICTION_TYPES
from training.run.state import RunState

STEPS = 1000
X_0 = torch.randn(64, 4, 3, 3, generator=torch.Generator().manual_seed(0))
DRAWS = Draws(0, 0, range(64))


def alphas_cumprod(schedule: str, zero_snr: bool) -> torch.Tensor:
    """Compute ᾱ_t in float64 from the definitions of the schedules and algorithm 1 of Lin et al. 2024."""
    if schedule == "linear":
        betas = torch.linspace(0.00085, 0.012, STEPS, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    else:  # Nichol and Dhariwal 2021
        f = [math.cos((t / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(STEPS + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(f)], dtype=torch.float64)
    alphas = torch.cumprod(1 - betas, 0)
    if zero_snr:
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas


CASES = [
    (prediction, schedule, zero)
    for prediction in PREDICTION_TYPES
    for schedule in BETA_SCHEDULES
    for zero in (False, True)
    if prediction != "flow_prediction" and (not zero or prediction in ("v_prediction", "sample"))
]


@pytest.mark.parametrize(("prediction_type", "beta_schedule", "zero_snr"), CASES)
def test_noise_levels_of_a_beta_schedule(prediction_type, beta_schedule, zero_snr):
    config = DiffusionConfig(
        prediction_type=prediction_type, beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr
    )
    config.validate()
    noisy = Diffusion(config).corrupt(X_0, DRAWS, sampling="uniform")
    timesteps = (DRAWS.uniform("time") * STEPS).long()
    assert torch.equal(noisy.timesteps, timesteps)
    signal = alphas_cumprod(beta_schedule, zero_snr)[timesteps].reshape(-1, 1, 1, 1)
    noise = DRAWS.normal("noise", (4, 3, 3)).double()
    x_t = signal.sqrt() * X_0 + (1 - signal).sqrt() * noise
    assert noisy.x_t.double() == pytest.approx(x_t, abs=2e-3 if zero_snr else 2e-4)
    target = {
        "epsilon": noise, "sample": X_0.double(), "v_prediction": signal.sqrt() * noise - (1 - signal).sqrt() * X_0
    }[prediction_type]  # fmt: skip
    assert noisy.target.double() == pytest.approx(target, abs=2e-3 if zero_snr else 2e-4)
    assert torch.equal(noisy.weight, torch.ones(64))


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_the_last_level_is_pure_noise_only_with_zero_snr(beta_schedule):
    for zero_snr in (False, True):
        diffusion = Diffusion(
            DiffusionConfig(
                prediction_type="v_prediction", beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr
            )
        )
        alpha, sigma, timesteps = diffusion.noise_levels(torch.tensor([1 - 1e-7]))
        assert timesteps.item() == STEPS - 1
        if zero_snr:
            assert (alpha.item(), sigma.item()) == pytest.approx((0, 1), abs=1e-6)
        else:
            assert alpha.item() > 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_the_straight_line(shift):
    diffusion = Diffusion(DiffusionConfig(prediction_type="flow_prediction", flow_shift=shift))
    noisy = diffusion.corrupt(X_0, DRAWS, sampling="uniform")
    t = DRAWS.uniform("time")
    sigma = (shift * t / (1 + (shift - 1) * t)).reshape(-1, 1, 1, 1)
    noise = DRAWS.normal("noise", (4, 3, 3))
    assert torch.allclose(noisy.x_t, (1 - sigma) * X_0 + sigma * noise, atol=1e-6)
    assert torch.allclose(noisy.target, noise - X_0)
    assert torch.allclose(noisy.timesteps.float(), sigma.flatten() * STEPS, rtol=1e-6)


def test_flow_matching_trains_at_the_levels_its_scheduler_samples_at():
    """For the same sigma, the U-Net gets the same timestep in training as from the scheduler in sampling."""
    import diffusers

    diffusion = Diffusion(DiffusionConfig(prediction_type="flow_prediction", flow_shift=3.0))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(diffusion.scheduler.config)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps
    assert torch.allclose(timesteps, scheduler.sigmas[:-1] * STEPS, rtol=1e-5)
    assert timesteps.max() <= STEPS


def test_the_least_noise_level_is_below_all_but_a_thousandth_of_the_training():
    """sigmoid(0.8 - 3) = 0.0998; three standard deviations leave 0.135 % of a normal distribution below them."""
    config = DiffusionConfig(logit_mean=0.8)
    assert config.least_noise_level == pytest.approx(1 / (1 + math.exp(2.2)), abs=1e-4)
    diffusion, draws = Diffusion(config), Draws(0, 0, range(20_000))
    levels = diffusion.corrupt(torch.zeros(20_000, 1, 1, 1), draws).timesteps / 1000
    assert 0.0003 < (levels < config.least_noise_level).float().mean() < 0.0025
    for other in ({"timestep_sampling": "uniform"}, {"prediction_type": "epsilon"}):
        assert DiffusionConfig(**other).least_noise_level == 0
    shifted = DiffusionConfig(flow_shift=3.0).least_noise_level
    assert shifted == pytest.approx(3 * 0.04743 / (1 + 2 * 0.04743), abs=1e-4)


def test_offset_noise_moves_whole_channels():
    plain = Diffusion(DiffusionConfig()).corrupt(X_0, DRAWS)
    offset = Diffusion(DiffusionConfig(noise_offset=0.3)).corrupt(X_0, DRAWS)
    difference = offset.target - plain.target
    assert difference.flatten(2).std(2).max() < 1e-6
    assert difference.flatten(2).mean(2).std().item() == pytest.approx(0.3, rel=0.2)


def same(one: NoisyBatch, other: NoisyBatch) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(NoisyBatch))


def of_candidates(number: int, **options) -> Diffusion:
    config = DiffusionConfig(noise_candidates=number, **options)
    config.validate()
    return Diffusion(config)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_a_single_candidate_is_the_noise_of_this_name(offset):
    """Runs that were started before candidates existed resume with these bits."""
    noise = DRAWS.normal("noise", (4, 3, 3))
    if offset:
        noise = noise + offset * DRAWS.normal("noise_offset", (4, 1, 1))
    draws = Draws(0, 0, range(64))
    noisy = of_candidates(1, prediction_type="epsilon", noise_offset=offset).corrupt(X_0, draws)
    assert torch.equal(noisy.target, noise)
    assert "noise_candidates" not in {request.name for request in draws.asked}


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_each_sample_gets_the_nearest_of_its_candidates(offset):
    noisy = of_candidates(4, prediction_type="epsilon", noise_offset=offset).corrupt(X_0, DRAWS)
    first, others = DRAWS.normal("noise", (4, 3, 3)), DRAWS.normal("noise_candidates", (3, 4, 3, 3))
    shift = offset * DRAWS.normal("noise_offset", (4, 1, 1)) if offset else torch.zeros(64, 4, 1, 1)
    places = []
    for i in range(64):
        candidates = [noise + shift[i] for noise in (first[i], *others[i])]
        distances = [float((noise.double() - X_0[i].double()).square().sum()) for noise in candidates]
        places.append(distances.index(min(distances)))
        assert torch.equal(noisy.target[i], candidates[places[-1]])
    assert set(places) == {0, 1, 2, 3}
    plain = of_candidates(1, prediction_type="epsilon", noise_offset=offset).corrupt(X_0, DRAWS)
    assert torch.equal(noisy.timesteps, plain.timesteps)


@pytest.mark.parametrize("kind", [Draws, GroupedDraws])
def test_the_choice_does_not_depend_on_how_a_batch_is_split(kind):
    one, four = (of_candidates(number, prediction_type="epsilon") for number in (1, 4))
    whole = four.corrupt(X_0, kind(0, 0, range(64))).target
    parts = [slice(0, 20), slice(20, 64)]
    split = [four.corrupt(X_0[part], kind(0, 0, range(64)[part])).target for part in parts]
    assert torch.equal(torch.cat(split), whole)
    assert not torch.equal(one.corrupt(X_0, kind(0, 0, range(64))).target, whole)


def test_validation_has_plain_noise_whatever_the_number_of_candidates():
    one, four = (of_candidates(number).corrupt(X_0, DRAWS, sampling="uniform") for number in (1, 4))
    assert same(one, four)


def test_candidates_can_be_drawn_ahead():
    diffusion, state, layout = of_candidates(4), RunState(draws_version=NEWEST), BatchLayout(64)
    ahead = StepDraws(0, state, layout, X_0.device, ahead=True)
    draws = ahead.at(0, 0)
    diffusion.corrupt(X_0, draws)
    ahead.prepare(1, 0, draws.asked)
    made = ahead.at(1, 0)
    assert [request.shape for request in made.made if request.name == "noise_candidates"] == [(3, 4, 3, 3)]
    assert same(diffusion.corrupt(X_0, made), diffusion.corrupt(X_0, GroupedDraws(0, 1, range(64))))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_follow_the_levels(prediction_type):
    config = DiffusionConfig(prediction_type=prediction_type, snr_gamma=5.0)
    diffusion = Diffusion(config)
    noisy = diffusion.corrupt(X_0, DRAWS, sampling="uniform")
    alpha, sigma, _ = diffusion.noise_levels(DRAWS.uniform("time"))
    snr = (alpha.double() / sigma.double()) ** 2
    expected = {
        "epsilon": snr.clamp(max=5) / snr,
        "sample": snr.clamp(max=5),
        "v_prediction": snr.clamp(max=5) / (snr + 1),
        "flow_prediction": snr.clamp(max=5) * sigma.double() ** 2,
    }[prediction_type]
    assert noisy.weight.double() == pytest.approx(expected, rel=1e-3)
    error = torch.ones_like(X_0)
    assert noisy.loss(noisy.target + error).double() == pytest.approx(expected, rel=1e-3)
    assert diffusion.trivial_loss is None


def test_validation_times_are_uniform_whatever_the_training_distribution():
    config = DiffusionConfig(timestep_sampling="logit_normal", logit_mean=2.0)
    diffusion = Diffusion(config)
    many = Draws(0, "validation", range(4000))
    x_0 = torch.zeros(4000, 1, 1, 1)
    times = diffusion.corrupt(x_0, many, sampling="uniform").timesteps / STEPS
    assert times.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (diffusion.corrupt(x_0, many).timesteps / STEPS).mean().item() > 0.75


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prediction_type", "noise"),
        ("beta_schedule", "cosine"),
        ("timestep_sampling", "normal"),
        ("cfg_dropout", 1.5),
        ("snr_gamma", 0.0),
        ("flow_shift", 0.0),
        ("noise_offset", -0.1),
        ("noise_candidates", 0),
    ],
)
def test_invalid_values(field, value):
    with pytest.raises(UserError, match=f"--{field}"):
        DiffusionConfig(**{field: value}).validate()


def test_losses_by_noise_level_are_means_over_bands_of_the_times():
    draws = Draws(0, "validation", range(200))
    losses = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums = {name: float(value) for name, value in noise_level_sums(losses, draws).items()}
    metrics = noise_level_metrics(sums)
    times = draws.uniform("time")
    assert list(metrics) == [f"val_loss_noise_{band}" for band in NOISE_BANDS]
    for number, value in enumerate(metrics.values()):
        inside = (times >= number / 4) & (times < (number + 1) / 4)
        assert inside.sum() > 20
        assert value == pytest.approx(float(losses[inside].mean()), rel=1e-12)
    assert sum(value for name, value in sums.items() if name.startswith("count")) == 200


def test_the_bands_are_those_of_the_noise_that_was_added():
    """The noisiest band has the largest sigma: a zero image has the variance sigma² there."""
    draws = Draws(0, "validation", range(400))
    noisy = Diffusion(DiffusionConfig()).corrupt(torch.zeros(400, 4, 8, 8), draws, sampling="uniform")
    metrics = noise_level_metrics(noise_level_sums(noisy.x_t.square().flatten(1).mean(1), draws))
    values = [float(value) for value in metrics.values()]
    assert values == pytest.approx([t**2 + 1 / 192 for t in (1 / 8, 3 / 8, 5 / 8, 7 / 8)], rel=0.2)


def test_a_band_without_samples_and_a_stage_without_noise_have_no_metric():
    draws = Draws(0, "validation", [0])
    assert len(noise_level_metrics(noise_level_sums(torch.ones(1), draws))) == 1
    assert noise_level_metrics({"loss": 1.0, "count": 2.0}) == {}
