"""Class balancing (`--balance_by COLUMN`): rows of rare classes are drawn more often than once per epoch.

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
    """Options for drawing rare classes more often."""

    help_group = "Data"

    balance_by: str | None = option(None)
    """Column with the class of each row; rows of rare classes are drawn more often (see --balance_power). If unset,
    all rows are drawn equally often"""
    balance_power: float = option(1.0, at_least=0, at_most=1)
    """Strength of --balance_by: 0 keeps the classes' fractions of the dataset, 1 draws all classes equally often"""


def balanced_strata(data: Any, config: BalanceConfig) -> Strata | None:
    """Return the classes and their shares of an epoch for `--balance_by`, and log the shares before and after.

    A row of class c has the weight n_c^-power. The class then has a share of an epoch proportional to
    n_c^(1 - power): its share of the rows at power 0, and the same share as every other class at power 1.

    Args:
        data: a stage's training data; it must have a method `classes(column) -> RowClasses`.

    Returns:
        None without a column or at power 0: nothing is weighted, and an epoch is the usual permutation.

    Raises:
        UserError: the data have no columns or not this column, or a class has no rows.
    """
    column, power = config.balance_by, config.balance_power
    if not column:
        return None
    if getattr(data, "batch_groups", None) is not None:
        raise UserError(
            f"--balance_by {column} and --aspect_buckets true cannot be combined: both decide which rows are in a "
            "batch; leave one of them out"
        )
    if getattr(data, "row_blocks", None) is not None:
        raise UserError(
            f"--balance_by {column} and --streaming true cannot be combined: one draws rows from anywhere, and the "
            "other reads shards nearly in turn; leave one of them out"
        )
    if not hasattr(data, "classes"):
        raise UserError(f"--balance_by {column}: {type(data).__name__} has no columns; leave the flag out")
    classes: RowClasses = data.classes(column)
    counts = torch.bincount(classes.ids, minlength=len(classes.names)).double()
    empty = [name for name, count in zip(classes.names, counts.tolist(), strict=True) if not count]
    if empty:
        raise UserError(
            f"--balance_by {column}: {_some(empty)} of its {len(classes.names)} classes {_has(len(empty))} no sample "
            f"in the training data; add samples, remove the class from the column's class names, or balance by "
            f"another column"
        )
    before, weighted = counts / counts.sum(), counts ** (1 - power)
    shares = weighted / weighted.sum()
    changes = _changes(classes.names, before.tolist(), shares.tolist())
    logger.info("balancing by %s (power %g); share of the rows → share of an epoch: %s", column, power, changes)
    return Strata(classes.ids, shares) if power else None


def _changes(names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> str:
    """Describe how the shares of the largest and the smallest classes change."""
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
