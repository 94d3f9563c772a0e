"""`--balance_by COLUMN`: rows of rare classes drawn more often, so that classes have other shares of an epoch.

N rows, K classes, n_c rows of class c.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.tools.cli import UserError
from training.core.classes import RowClasses
from training.core.options import Options, option
from training.engine.sampler import Strata

logger = logging.getLogger("halftone")

CLASSES_SHOWN = 12


@dataclass
class BalanceConfig(Options):
    """How often the samples of each class are drawn."""

    balance_by: str | None = option(None)
    """Column of classes: samples of rare classes are drawn more often, as far as --balance_power says."""
    balance_power: float = option(1.0, at_least=0, at_most=1)
    """A sample of a class of n rows has the weight n^-power: 0 draws rows as they are, 1 all classes equally often."""


def balanced_strata(data: Any, config: BalanceConfig) -> Strata | None:
    """What the sampler needs for `--balance_by`; the shares before and after go to the log.

    A row of class c has the weight n_c^-power, so that the class has a share proportional to n_c^(1 - power): at 0 its
    share of the rows, at 1 that of every other class.

    Args:
        data: a stage's training data; it must have a method `classes(column) -> RowClasses`.

    Returns:
        None where nothing is weighted, with no column or at power 0: an epoch is then the usual permutation.

    Raises:
        UserError: data without columns, no such column, or a class without a row.
    """
    column, power = config.balance_by, config.balance_power
    if not column:
        return None
    if not hasattr(data, "classes"):
        raise UserError(f"--balance_by {column}: {type(data).__name__} has no columns to balance by; leave it out")
    classes: RowClasses = data.classes(column)
    counts = torch.bincount(classes.ids, minlength=len(classes.names)).double()
    empty = [name for name, count in zip(classes.names, counts.tolist(), strict=True) if not count]
    if empty:
        raise UserError(
            f"--balance_by {column}: {_some(empty)} of its {len(classes.names)} classes {_has(len(empty))} no sample "
            f"in the training data; add some, take the name out of the column's classes, or balance by another column"
        )
    before, weighted = counts / counts.sum(), counts ** (1 - power)
    shares = weighted / weighted.sum()
    changes = _changes(classes.names, before.tolist(), shares.tolist())
    logger.info("balanced by %s (power %g), share of the rows → of an epoch: %s", column, power, changes)
    return Strata(classes.ids, shares) if power else None


def _changes(names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> str:
    """How the shares of the largest and the smallest classes change, in words."""
    ranked = sorted(zip(before, after, names, strict=True), reverse=True)
    parts = [f"{name} {100 * old:.3g} → {100 * new:.3g} %" for old, new, name in ranked]
    if len(parts) > CLASSES_SHOWN:
        half = CLASSES_SHOWN // 2
        parts = [*parts[:half], f"… {len(parts) - 2 * half} more …", *parts[-half:]]
    return ", ".join(parts)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _has(count: int) -> str:
    return "has" if count == 1 else "have"
