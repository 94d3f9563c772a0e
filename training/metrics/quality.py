"""How close generated images are to real ones: all distances of two sets of features, and what real images reach.

A distance means nothing without its floor: the distance of real images from other real images, in sets of the same
size. n real images, m generated ones, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training.core.exchange import ALONE, Exchange
from training.metrics.distances import (
    NEIGHBOURS,
    Moments,
    diversity,
    frechet_distance,
    kernel_distance,
    neighbourhood_metrics,
)

FLOOR_SPLITS = 20
# Each floor of the Fréchet distance takes seconds, and its spread is small.
FRECHET_FLOOR_SPLITS = 5


@dataclass
class Distances:
    """Distances of generated images from real ones.

    Attributes:
        values: kid, kid_standard_error, fd, precision, recall, density, coverage, diversity; see `distances.py`.
        refused: names of distances that could not be computed, and why.
    """

    values: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def measure_distances(real: Tensor, generated: Tensor) -> Distances:
    """Compute every distance that the numbers of images allow: n D, m D."""
    result = Distances()

    def kid() -> dict[str, float]:
        estimate = kernel_distance(real, generated)
        return {"kid": estimate.value, "kid_standard_error": estimate.standard_error}

    def fd() -> dict[str, float]:
        return {"fd": frechet_distance(Moments().add(real), Moments().add(generated))}

    def neighbourhoods() -> dict[str, float]:
        return neighbourhood_metrics(real, generated)

    for name, compute in (("kid", kid), ("fd", fd), ("precision", neighbourhoods)):
        try:
            result.values |= compute()
        except ValueError as error:
            result.refused[name] = str(error)
    spread = diversity(generated)
    if math.isfinite(spread):
        result.values["diversity"] = spread
    return result


def measure_floor(
    real: Tensor, size: int, *, seed: int = 0, splits: int = FLOOR_SPLITS, exchange: Exchange = ALONE
) -> dict[str, Any]:
    """Compute the distances between two sets of real images, over random splits.

    Args:
        real: n D
        size: number of images in each set, as many as are generated; lowered to n // 2 if there are fewer real ones.
        seed: seed of the splits.
        exchange: the processes that divide the splits among them; all of them call this.

    Returns:
        `images` (the size of each set), `splits`, and a mean and a standard deviation (`mean`, `std`) of kid, fd,
        precision, recall, density and coverage; only those that can be computed. The floor of KID may be below 0.
    """
    size = min(size, len(real) // 2)
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(len(real), generator=generator)[: 2 * size] for _ in range(splits)]

    def floors_of(numbers: Sequence[int]) -> list[dict[str, float]]:
        return [_floor_of(real[chosen[n][:size]], real[chosen[n][size:]], n) for n in numbers]

    values: dict[str, list[float]] = {}
    for found in exchange.map(floors_of, splits, 1):
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    floors = {name: _spread(torch.tensor(found, dtype=torch.float64)) for name, found in values.items()}
    return {"images": size, "splits": splits, **floors}


def _floor_of(one: Tensor, other: Tensor, number: int) -> dict[str, float]:
    found: dict[str, float] = {}
    if len(one) >= 4:
        found["kid"] = kernel_distance(one, other, groups=2).value
    if len(one) > one.shape[1] and number < FRECHET_FLOOR_SPLITS:
        found["fd"] = frechet_distance(Moments().add(one), Moments().add(other))
    if len(one) > NEIGHBOURS:
        found |= neighbourhood_metrics(one, other)
    return found


def _spread(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std()) if len(values) > 1 else 0.0}
