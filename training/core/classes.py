"""The class of each row of a dataset, for weighted sampling.

N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowClasses:
    """The class of each row. ids: N, int64, from 0 to K - 1; names: K, including classes that have no rows."""

    ids: Tensor
    names: Sequence[str]
