"""Distances between two sets of images, computed from their features.

All functions take features of real and of generated images and compute in float64. n real images, m generated ones, D
features.

- Fréchet distance (FD; FID with Inception's features): Heusel et al. 2017, arXiv:1706.08500.
- Kernel distance (KID), the unbiased squared MMD with a cubic kernel: Bińkowski et al. 2018, arXiv:1801.01401.
- Precision and recall: Kynkäänniemi et al. 2019, arXiv:1904.06991; density and coverage: Naeem et al. 2020,
  arXiv:2002.09797.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

ROWS_AT_A_TIME = 2048
KID_GROUPS = 20
NEIGHBOURS = 5


@dataclass
class Moments:
    """Mean and covariance of features, accumulated batch by batch.

    Sums are taken around the first batch's mean, so that large means do not cost precision.
    """

    count: int = 0
    shift: Tensor | None = None
    total: Tensor = field(default_factory=lambda: torch.zeros(0))
    products: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, features: Tensor) -> Moments:
        """Add features (n D, any floating type) and return self."""
        features = features.detach().double().cpu()
        if self.shift is None:
            self.shift = features.mean(0)
            self.total, self.products = (
                torch.zeros_like(self.shift),
                torch.zeros(len(self.shift), len(self.shift)).double(),
            )
        centred = features - self.shift
        self.count += len(features)
        self.total += centred.sum(0)
        self.products += centred.T @ centred
        return self

    def merge(self, other: Moments) -> Moments:
        """Add the moments of other images, as another process has counted them, and return self."""
        if other.shift is None:
            return self
        if self.shift is None:
            self.count, self.shift = other.count, other.shift.clone()
            self.total, self.products = other.total.clone(), other.products.clone()
            return self
        move = other.shift - self.shift
        cross = torch.outer(other.total, move)
        self.products += other.products + cross + cross.T + other.count * torch.outer(move, move)
        self.total += other.total + other.count * move
        self.count += other.count
        return self

    @property
    def mean(self) -> Tensor:
        """D, float64"""
        assert self.shift is not None
        return self.shift + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """D D, float64, with the unbiased denominator n - 1."""
        centre = self.total / self.count
        return (self.products - self.count * torch.outer(centre, centre)) / (self.count - 1)


def frechet_distance(real: Moments, generated: Moments) -> float:
    """Compute ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), at least 0.

    The trace of the root is the sum of the singular values of Σ₁^½ Σ₂^½, which needs no root of a matrix that is not
    symmetric.

    Raises:
        ValueError: a set has no more images than features, so that its covariance is singular and the distance is
            dominated by the size of the sample.
    """
    for moments in (real, generated):
        if moments.count <= len(moments.mean):
            raise ValueError(f"{moments.count} images are too few for the covariance of {len(moments.mean)} features")
    trace_of_root = torch.linalg.svdvals(_root(real.covariance) @ _root(generated.covariance)).sum()
    traces = real.covariance.trace() + generated.covariance.trace()
    squared_means = (real.mean - generated.mean).square().sum()
    return max(float(squared_means + traces - 2 * trace_of_root), 0.0)


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    standard_error: float


def kernel_distance(real: Tensor, generated: Tensor, groups: int = KID_GROUPS) -> Estimate:
    """Compute the unbiased squared MMD with the kernel (x·y / D + 1)³; it may be slightly below 0.

    The standard error is that of the jackknife: the estimate is repeated without each of `groups` subsets of images.
    Images i, i + groups, i + 2 groups, … form a subset, so the order of the images should not be periodic.

    Args:
        real: n D
        generated: m D
        groups: number of subsets; lowered for fewer images than two per subset.

    Raises:
        ValueError: fewer than 4 images in a set.
    """
    return _estimate(*_jackknife(real, generated, groups))


def kernel_distance_change(real: Tensor, before: Tensor, after: Tensor, groups: int = KID_GROUPS) -> Estimate:
    """Compute how much larger the kernel distance of `after` from `real` is than that of `before`.

    Image i of `before` and image i of `after` were generated for the same condition from the same noise. The jackknife
    leaves out both together, and the same real images in both distances, so that what they have in common cancels: the
    standard error is that of the difference, which is usually much smaller than that of either distance.

    Args:
        real: n D
        before: m D
        after: m D
        groups: as in `kernel_distance`.

    Raises:
        ValueError: fewer than 4 images in a set, or sets of different sizes.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} images before and {len(after)} after cannot be compared in pairs")
    parts = [_jackknife(real, generated, groups) for generated in (before, after)]
    return _estimate(parts[1][0] - parts[0][0], parts[1][1] - parts[0][1])


def _jackknife(real: Tensor, generated: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the unbiased squared MMD, and its values without each subset of images: groups."""
    fewest = min(len(real), len(generated))
    if fewest < 4:
        raise ValueError(f"{fewest} images are too few for a kernel distance; at least 4 are needed")
    groups = min(groups, fewest // 2)
    sums = _KernelSums.between(real, generated, groups)
    everything = torch.ones(groups, dtype=torch.float64)
    without = torch.stack([sums.estimate(everything - torch.eye(groups).double()[g]) for g in range(groups)])
    return sums.estimate(everything), without


def _estimate(value: Tensor, without: Tensor) -> Estimate:
    """Return a value with the standard error of the jackknife, from its values without each subset."""
    groups = len(without)
    error = ((groups - 1) / groups * (without - without.mean()).square().sum()).sqrt()
    return Estimate(float(value), float(error))


@dataclass(frozen=True)
class _KernelSums:
    """Sums of kernel values between subsets of images (groups groups), without those of an image with itself."""

    real: Tensor
    generated: Tensor
    between_sets: Tensor
    real_sizes: Tensor
    generated_sizes: Tensor

    @classmethod
    def between(cls, real: Tensor, generated: Tensor, groups: int) -> _KernelSums:
        real, generated = real.double(), generated.double()
        return cls(
            _grouped_kernel(real, real, groups, itself=True),
            _grouped_kernel(generated, generated, groups, itself=True),
            _grouped_kernel(real, generated, groups, itself=False),
            _membership(len(real), groups).sum(0),
            _membership(len(generated), groups).sum(0),
        )

    def estimate(self, used: Tensor) -> Tensor:
        """Return the unbiased squared MMD of the subsets with the weight 1 in `used` (groups, 0 or 1)."""
        n, m = used @ self.real_sizes, used @ self.generated_sizes
        within_real = used @ self.real @ used / (n * (n - 1))
        within_generated = used @ self.generated @ used / (m * (m - 1))
        return within_real + within_generated - 2 * (used @ self.between_sets @ used) / (n * m)


def _grouped_kernel(a: Tensor, b: Tensor, groups: int, *, itself: bool) -> Tensor:
    columns = _membership(len(b), groups)
    sums = torch.zeros(groups, groups, dtype=torch.float64)
    rows = _membership(len(a), groups)
    for start in range(0, len(a), ROWS_AT_A_TIME):
        chunk = slice(start, start + ROWS_AT_A_TIME)
        kernel = (a[chunk] @ b.T / a.shape[1] + 1).pow(3)
        if itself:
            kernel[torch.arange(len(kernel)), torch.arange(start, start + len(kernel))] = 0
        sums += rows[chunk].T @ kernel @ columns
    return sums


def _membership(count: int, groups: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.arange(count) % groups, groups).double()


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def neighbourhood_metrics(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Compute precision, recall, density and coverage, each from 0 (density: to above 1) and higher is better.

    The neighbourhood of an image is the ball up to its k-th nearest neighbour in its own set. Precision is the fraction
    of generated images within a neighbourhood of a real one; recall the fraction of real images within a neighbourhood
    of a generated one; density the mean number of neighbourhoods of real images that contain a generated image, divided
    by k; coverage the fraction of real images whose neighbourhood contains a generated image.

    Args:
        real: n D
        generated: m D

    Raises:
        ValueError: a set has no more than `neighbours` images.
    """
    fewest = min(len(real), len(generated))
    if fewest <= neighbours:
        raise ValueError(f"{fewest} images are too few for neighbourhoods of {neighbours}; more are needed")
    real, generated = real.double(), generated.double()
    real_radii, generated_radii = _radii(real, neighbours), _radii(generated, neighbours)
    real_covered = torch.zeros(len(real), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    containing = torch.zeros(len(generated), dtype=torch.float64)
    for start in range(0, len(real), ROWS_AT_A_TIME):
        chunk = slice(start, start + ROWS_AT_A_TIME)
        distances = torch.cdist(real[chunk], generated)
        inside = distances < real_radii[chunk, None]
        containing += inside.sum(0)
        real_covered[chunk] = inside.any(1)
        recalled[chunk] = (distances < generated_radii[None]).any(1)
    return {
        "precision": float((containing > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(containing.mean() / neighbours),
        "coverage": float(real_covered.double().mean()),
    }


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each image to its k-th nearest neighbour: n"""
    radii = []
    for start in range(0, len(features), ROWS_AT_A_TIME):
        distances = torch.cdist(features[start : start + ROWS_AT_A_TIME], features)
        radii.append(distances.kthvalue(neighbours + 1, dim=1).values)  # the nearest is the image itself
    return torch.cat(radii)


def diversity(features: Tensor) -> float:
    """Compute the mean Euclidean distance of two different images: n D → at least 0; nan for fewer than two images."""
    features, total, count = features.double(), 0.0, len(features)
    for start in range(0, count, ROWS_AT_A_TIME):
        total += float(torch.cdist(features[start : start + ROWS_AT_A_TIME], features).sum())
    return total / (count * (count - 1)) if count > 1 else float("nan")
