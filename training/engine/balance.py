"""`--balance_by COLUMN`: rows of rare classes drawn more often, so that classes have other shares of an epoch.

N rows, K classes, n_c rows of class c.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipelines.tools.cli import UserError
from training.core.classes import RowClasses
from training.engine.sampler import Strata

if TYPE_CHECKING:
    pass

logger = logging.getLogger("halftone")

CLASSES_SHOWN = 12


def balanced_strata(data: Any, column: str | None, power: float) -> Strata | None:
    """What the sampler needs for `--balance_by`; the shares before and after go to the log.

    A row of class c has the weight n_c^-power, so that the class has a share proportional to n_c^(1 - power): at 0 its
    share of the rows, at 1 that of every other class.

    Args:
        data: a stage's training data; it must have a method `classes(column) -> RowClasses`.
        column: None balances nothing.
        power: in [0, 1].

    Returns:
        None where nothing is weighted, with no column or at power 0: an epoch is then the usual permutation.

    Raises:
        UserError: data without columns, no such column, or a class without a row.
    """
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
    """Of the largest classes and the smallest ones."""
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
