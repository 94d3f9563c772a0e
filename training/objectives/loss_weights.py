"""Learned weights of several losses.

Kendall, Gal and Cipolla (2018), "Multi-task learning using uncertainty to weigh losses for scene geometry and
semantics", section 3.2: each task i has an observation noise of variance exp(s_i), and the negative log-likelihood of
all tasks together is

    sum over regression tasks      exp(-s_i) L_i / 2 + s_i / 2      (eq. 7; L_i a squared error)
    sum over classification tasks  exp(-s_i) L_i     + s_i / 2      (eq. 10; L_i a cross-entropy)

At its minimum over s_i, a term is log(L_i) / 2 plus a constant, so that the sum may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn


def regression_term(loss: Tensor, log_variance: Tensor) -> Tensor:
    """Compute exp(-s) L / 2 + s / 2."""
    return 0.5 * (torch.exp(-log_variance) * loss + log_variance)


def classification_term(loss: Tensor, log_variance: Tensor) -> Tensor:
    """Compute exp(-s) L + s / 2."""
    return torch.exp(-log_variance) * loss + 0.5 * log_variance


class LearnedLossWeights(nn.Module):
    """Weighted sum of losses with one trained log-variance per loss.

    Args:
        start: initial weight of each loss, above 0.
        regression: names of the losses that are squared errors; the others are cross-entropies.
    """

    def __init__(self, start: Mapping[str, float], regression: Collection[str]):
        super().__init__()
        self.regression = frozenset(regression)
        # Vectors of one element, because FSDP does not accept scalar parameters.
        self.log_variances = nn.ParameterDict(
            {name: torch.tensor([-math.log(self._halves(name) * weight)]) for name, weight in start.items()}
        )

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of all terms, a scalar; `losses` has a scalar for each name in `start`."""
        terms = []
        for name, loss in losses.items():
            term = regression_term if name in self.regression else classification_term
            terms.append(term(loss.float(), self.log_variances[name]))
        return torch.stack(terms).sum()

    def weights(self) -> dict[str, Tensor]:
        """Return the current weight of each loss."""
        return {name: (-s.detach()[0]).exp() / self._halves(name) for name, s in self.log_variances.items()}

    def _halves(self, name: str) -> float:
        return 2.0 if name in self.regression else 1.0


def weighted_sum(
    losses: Mapping[str, Tensor],
    weights: Mapping[str, float],
    learned: LearnedLossWeights | None,
    groups: Mapping[str, Collection[str]],
) -> Tensor:
    """Compute the total loss, a scalar.

    Args:
        losses, weights: scalars of the same names.
        learned: replaces the given weights of the losses (or groups) that it has; None uses the given weights for all.
        groups: name in `learned` → names of losses that count as one loss there, the sum of their weighted values.
    """
    weighted = {name: weights[name] * value for name, value in losses.items()}
    if learned is None:
        return torch.stack(list(weighted.values())).sum()
    tasks = {
        group: torch.stack([weighted.pop(name) for name in names if name in weighted]).sum()
        for group, names in groups.items()
    }
    tasks |= {name: losses[name] for name in learned.log_variances if name in losses}
    fixed = [value for name, value in weighted.items() if name not in tasks]
    return torch.stack([learned(tasks), *fixed]).sum()
