"""Classes read from a column of a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pipelines.tools.cli import UserError
from training.core.classes import RowClasses
from training.data.source import column_values, require_column

if TYPE_CHECKING:
    from datasets import Dataset


def column_classes(dataset: Dataset, column: str) -> RowClasses:
    """Return the classes of a stored column: those named by its type (`ClassLabel`), or its distinct values, sorted.

    Raises:
        UserError: the column does not exist or does not hold classes, or rows have no class.
    """
    require_column(dataset, column, "balance_by")
    feature: Any = dataset.features[column]
    declared = getattr(feature, "names", None)
    kind = str(getattr(feature, "dtype", feature))
    if not declared and not kind.startswith(("string", "large_string", "bool", "int", "uint", "float")):
        raise UserError(f"column '{column}' holds {kind}, not classes; choose another with --balance_by")
    values = list(column_values(dataset, column))
    if kind.startswith("float"):  # of pandas, which writes whole numbers so if some of them are missing
        values = [None if value is None or value != value else value for value in values]
        if any(not value.is_integer() for value in values if value is not None):
            raise UserError(f"column '{column}' holds {kind}, not classes; choose another with --balance_by")
        values = [None if value is None else int(value) for value in values]
    known = range(len(declared)) if declared else sorted({value for value in values if value not in (None, "")})
    id_of = {value: i for i, value in enumerate(known)}
    without = sum(value not in id_of for value in values)
    if without:
        raise UserError(
            f"{without} of {len(values):,} rows have no class in column '{column}'; give them one, "
            "or choose another column with --balance_by"
        )
    return RowClasses(torch.tensor([id_of[value] for value in values]), declared or [str(value) for value in known])
