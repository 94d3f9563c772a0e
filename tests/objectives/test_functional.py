"""Objectives compared with closed forms, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from training.objectives import functional as objectives
from training.objectives.functional import PREDICTION_TYPES

torch.manual_seed(0)
X_0, NOISE = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
ANGLE = torch.tensor([0.1, 0.7, 1.2, 1.5], dtype=torch.float64)


def levels(prediction_type):
    if prediction_type == "flow_prediction":
        sigma = ANGLE / 2
        return 1 - sigma, sigma
    return ANGLE.cos(), ANGLE.sin()


X_0_OF = {
    "epsilon": lambda prediction, x_t, alpha, sigma: (x_t - sigma * prediction) / alpha,
    "v_prediction": lambda prediction, x_t, alpha, sigma: alpha * x_t - sigma * prediction,
    "sample": lambda prediction, x_t, alpha, sigma: prediction,
    "flow_prediction": lambda prediction, x_t, alpha, sigma: x_t - sigma * prediction,
}
"""The clean sample that a prediction implies."""


def implied_x_0(prediction_type, prediction, alpha, sigma):
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    return X_0_OF[prediction_type](prediction, alpha * X_0 + sigma * NOISE, alpha, sigma)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_target_implies_the_clean_sample(prediction_type):
    alpha, sigma = levels(prediction_type)
    target = objectives.prediction_target(prediction_type, X_0, NOISE, alpha, sigma)
    assert torch.allclose(implied_x_0(prediction_type, target, alpha, sigma), X_0, atol=1e-12)


def test_the_noisy_sample_is_the_weighted_sum():
    alpha, sigma = levels("epsilon")
    expected = alpha[:, None, None, None] * X_0 + sigma[:, None, None, None] * NOISE
    assert torch.allclose(objectives.corrupt(X_0, NOISE, alpha, sigma), expected, atol=1e-15)


def test_the_nearest_noise_is_chosen_for_each_sample_alone():
    """Candidate j of sample i is x_0 plus a vector of a known length."""
    lengths = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [2.0, 1.5, 1.0]], dtype=torch.float64)
    directions = torch.randn(4, 3, *X_0.shape[1:], dtype=torch.float64)
    directions /= directions.flatten(2).norm(dim=2).reshape(4, 3, 1, 1, 1)
    candidates = X_0.unsqueeze(1) + lengths.reshape(4, 3, 1, 1, 1) * directions
    chosen = objectives.nearest_noise(X_0, candidates)
    assert torch.equal(chosen, torch.stack([candidates[i, j] for i, j in enumerate((1, 0, 2, 2))]))


def test_distances_to_noise_are_not_rounded_to_half_precision():
    """Squared distances of 1,024 + 1/64 and 1,024: in bfloat16 both would be 1,024."""
    x_0 = torch.zeros(1, 1, 32, 32, dtype=torch.bfloat16)
    candidates = torch.ones(1, 2, 1, 32, 32, dtype=torch.bfloat16)
    candidates[0, 0, 0, 0, 0] += 2**-7
    assert torch.equal(objectives.nearest_noise(x_0, candidates), candidates[:, 1])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("gamma", [1.0, 5.0, 1e9])
def test_min_snr_weights_give_the_same_x_0_loss_in_every_parametrization(prediction_type, gamma):
    """weight × |target error|² must be min(SNR, γ) × |x_0 error|² (Hang et al. 2023)."""
    alpha, sigma = levels(prediction_type)
    target = objectives.prediction_target(prediction_type, X_0, NOISE, alpha, sigma)
    wrong = target + 0.1 * torch.randn_like(target)
    x_0_error = (implied_x_0(prediction_type, wrong, alpha, sigma) - X_0).square().flatten(1).mean(1)
    weight = objectives.min_snr_weight(prediction_type, alpha, sigma, gamma)
    weighted = weight * objectives.mse_per_sample(wrong, target)
    snr = (alpha / sigma) ** 2
    assert torch.allclose(weighted, snr.clamp(max=gamma) * x_0_error, rtol=1e-10)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_are_finite_at_both_ends(prediction_type):
    alpha, sigma = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    weight = objectives.min_snr_weight(prediction_type, alpha, sigma, 5.0)
    assert torch.isfinite(weight).all()
    if prediction_type == "v_prediction":  # at SNR 0, x_t does not contain x_0
        assert weight[0] == 0


def test_times_are_uniform_or_logit_normal():
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(objectives.unit_times(uniform, normal, "uniform"), uniform)
    times = objectives.unit_times(uniform, normal, "logit_normal", mean=0.5, std=0.8)
    logits = torch.logit(times.double())
    assert logits.mean() == pytest.approx(0.5, abs=0.01)
    assert logits.std() == pytest.approx(0.8, abs=0.01)
    assert times.min() > 0
    assert times.max() < 1


def test_shifting_keeps_the_ends():
    times = torch.tensor([0.0, 0.5, 1.0])
    assert objectives.shift_times(times, 3.0).tolist() == pytest.approx([0.0, 0.75, 1.0])
    assert torch.equal(objectives.shift_times(times, 1.0), times)


def test_kl_of_gaussians():
    assert objectives.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]
    mean, logvar = torch.tensor([[2.0]]), torch.tensor([[math.log(0.25)]])
    assert objectives.gaussian_kl(mean, logvar).item() == pytest.approx(0.5 * (4 + 0.25 - 1 - math.log(0.25)))


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert objectives.hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 0.75))
    assert objectives.hinge_generator_loss(fake).item() == pytest.approx(0.75)


def test_half_precision_errors_are_summed_in_float32():
    prediction = torch.full((1, 10_000), 300.0, dtype=torch.float16)
    assert torch.isfinite(objectives.mse_per_sample(prediction, torch.zeros_like(prediction))).all()


def test_trivial_loss_is_that_of_predicting_the_mean():
    x_0 = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(3))
    half = torch.full((200_000,), 0.5**0.5)
    for prediction_type in PREDICTION_TYPES:
        target = objectives.prediction_target(prediction_type, x_0, noise, half, half)
        assert target.square().mean().item() == pytest.approx(objectives.trivial_mse(prediction_type), rel=0.02)


def test_halved_is_bilinear_downsampling():
    maps = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(maps, scale_factor=0.5, mode="bilinear", align_corners=False)
    assert torch.allclose(objectives.halved(maps), expected)
    assert objectives.halved(maps)[0, 0, 2, 1] == pytest.approx(maps[0, 0, 4:6, 2:4].mean().item())
