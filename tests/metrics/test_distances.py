"""Distances between sets of images against closed forms and independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from training.metrics.distances import (
    Estimate,
    Moments,
    diversity,
    frechet_distance,
    kernel_distance,
    kernel_distance_change,
    neighbourhood_metrics,
)


def features(count: int, size: int = 16, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mix + shift + 100


def reference_frechet(a: np.ndarray, b: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


def reference_kid(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


def test_frechet_distance_equals_the_reference():
    a, b = features(400), features(300, shift=0.5, seed=1) * 1.1
    value = frechet_distance(Moments().add(a), Moments().add(b))
    assert value == pytest.approx(reference_frechet(a.numpy(), b.numpy()), rel=1e-6)


def test_frechet_distance_of_two_normal_distributions_with_diagonal_covariance():
    # For commuting covariances: ‖μ₁ - μ₂‖² + Σ (σ₁ - σ₂)².
    spread = torch.linspace(1, 3, 8, dtype=torch.float64)
    whitened = torch.linalg.qr(torch.randn(64, 9, dtype=torch.float64)).Q
    centred = whitened - whitened.mean(0)
    unit = torch.linalg.qr(centred).Q[:, :8] * 63**0.5  # mean 0 and covariance 1, exactly
    first, second = unit * spread, unit * 2 * spread + 0.25
    expected = 8 * 0.25**2 + float(spread.square().sum())
    assert frechet_distance(Moments().add(first), Moments().add(second)) == pytest.approx(expected, rel=1e-8)


def test_moments_do_not_depend_on_batches_or_processes():
    data = features(300).float()
    whole = Moments().add(data)
    streamed = Moments()
    for batch in data.split(7):
        streamed.add(batch)
    merged = Moments().add(data[:40]).merge(Moments()).merge(Moments().add(data[40:]))
    for moments in (streamed, merged, Moments().merge(whole)):
        torch.testing.assert_close(moments.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.covariance, whole.covariance, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.covariance, torch.from_numpy(np.cov(data.double().numpy().T)))


def test_too_few_images_for_a_covariance_are_refused():
    with pytest.raises(ValueError, match="16 images are too few for the covariance of 16 features"):
        frechet_distance(Moments().add(features(100)), Moments().add(features(16)))


def test_kernel_distance_equals_the_reference():
    a, b = features(30, 4) / 50, features(23, 4, shift=3.0, seed=1) / 50
    assert kernel_distance(a, b).value == pytest.approx(reference_kid(a.numpy(), b.numpy()), rel=1e-9)


def test_kernel_distance_of_equal_distributions_is_zero_within_its_standard_error():
    z = []
    for seed in range(40):
        estimate = kernel_distance(features(100, 4, seed=seed) - 100, features(100, 4, seed=seed + 1000) - 100)
        z.append(estimate.value / estimate.standard_error)
    assert abs(np.mean(z)) < 0.5  # unbiased
    assert np.mean(np.abs(z) < 3) > 0.9


def test_the_standard_error_of_a_shift_is_that_of_repeated_samples():
    estimates = [
        kernel_distance(features(200, 4, seed=s) - 100, features(200, 4, shift=1.0, seed=s + 500) - 100)
        for s in range(40)
    ]
    spread = np.std([e.value for e in estimates], ddof=1)
    assert np.mean([e.standard_error for e in estimates]) == pytest.approx(spread, rel=0.4)


def test_the_change_of_a_kernel_distance_is_the_difference_of_both():
    real, before, after = features(30, 4) / 50, features(24, 4, seed=1) / 50, features(24, 4, shift=9.0, seed=2) / 50
    change = kernel_distance_change(real, before, after)
    assert change.value == pytest.approx(kernel_distance(real, after).value - kernel_distance(real, before).value)
    assert kernel_distance_change(real, before, before) == Estimate(0.0, 0.0)
    with pytest.raises(ValueError, match="24 images before and 20 after cannot be compared in pairs"):
        kernel_distance_change(real, before, after[:20])


def test_the_standard_error_of_a_change_is_that_of_repeated_pairs_and_smaller_than_that_of_a_distance():
    """Pairs of images that differ little, for the same real images, against new samples of all of them."""
    changes, distances = [], []
    for seed in range(40):
        real, before = features(200, 4, seed=seed) - 100, features(200, 4, shift=1.0, seed=seed + 500) - 100
        after = before + 0.1 + 0.1 * (features(200, 4, seed=seed + 900) - 100)
        changes.append(kernel_distance_change(real, before, after))
        distances.append(kernel_distance(real, after))
    spread = np.std([change.value for change in changes], ddof=1)
    error = np.mean([change.standard_error for change in changes])
    assert error == pytest.approx(spread, rel=0.4)
    assert error < 0.5 * np.mean([distance.standard_error for distance in distances])


def test_precision_recall_density_and_coverage():
    torch.manual_seed(0)
    real = torch.randn(500, 4, dtype=torch.float64)
    same = torch.randn(500, 4, dtype=torch.float64)
    good = neighbourhood_metrics(real, same)
    assert good["precision"] > 0.9
    assert good["recall"] > 0.9
    assert good["coverage"] > 0.9
    assert good["density"] == pytest.approx(1, abs=0.1)
    one_mode = neighbourhood_metrics(torch.cat([real, real + 50]), torch.cat([same, same]))
    assert one_mode["precision"] > 0.9
    assert one_mode["coverage"] == pytest.approx(0.5, abs=0.05)
    assert one_mode["recall"] == pytest.approx(0.5, abs=0.05)
    far = neighbourhood_metrics(real, same + 50)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_diversity_is_the_mean_pairwise_distance():
    points = torch.tensor([[0.0], [3.0], [9.0]])
    assert diversity(points) == pytest.approx((3 + 9 + 6) / 3)
    assert np.isnan(diversity(points[:1]))


class _Values(torch.nn.Module):
    """Takes images for features."""

    num_features = 16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_both_distances_are_those_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = features(200) - 100, features(200, shift=0.5, seed=1) - 100
    frechet = FrechetInceptionDistance(feature=_Values()).set_dtype(torch.float64)
    # One subset of all images: the same estimate, as their polynomial kernel has the same coefficients.
    kernel = KernelInceptionDistance(feature=_Values(), subsets=1, subset_size=200).set_dtype(torch.float64)
    for metric in (frechet, kernel):
        metric.update(a, real=True)
        metric.update(b, real=False)
    assert frechet_distance(Moments().add(a), Moments().add(b)) == pytest.approx(float(frechet.compute()), rel=1e-4)
    assert kernel_distance(a, b).value == pytest.approx(float(kernel.compute()[0]), rel=1e-4)
