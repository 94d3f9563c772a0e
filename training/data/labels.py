"""The classes of a label column: names, whole numbers or truth values, numbered from 0 in the order of their names.

A stored number is the name of a class, as "cat" is one: the years 1985 to 2020 are 36 classes, and no row needs the
number 0. Only columns of the type `datasets.ClassLabel` store ids, whose names the type lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.common.conditions import whole_numbers
from pipelines.tools.cli import UserError, one_line
from training.data.source import DataConfig, distinct_values, load_all_splits, named_split, require_column

if TYPE_CHECKING:
    from datasets import Dataset

_TEXTS = ("string", "large_string", "string_view")
# More different numbers than this, most of which occur once, are numbers of rows or measurements, not classes.
_FEW_NUMBERS = 100
_NAMES_SHOWN = 8


class LabelMap:
    """Mapping from the values of the label column to class ids from 0, and from ids to names.

    Args:
        names: name of each class, by its id.
        ids: id of each stored value.
    """

    def __init__(self, names: Sequence[str], ids: Mapping[Any, int]):
        self.names = list(names)
        self._ids = ids

    @classmethod
    def of(cls, dataset: Dataset, column: str, recorded: Sequence[str] = ()) -> LabelMap:
        """Read the classes from the column's type, or from its distinct values if the type has no names.

        Args:
            recorded: names of the classes, by id, of a model or a latent cache that was made from such data. They stand
                if every class of the column is among them, so that an earlier run keeps its ids.

        Raises:
            UserError: the column does not exist or does not hold classes.
        """
        require_column(dataset, column, "label_column")
        feature: Any = dataset.features[column]
        declared = getattr(feature, "names", None)
        if declared:
            named: dict[Any, str] = dict(enumerate(declared))
        else:
            kind = str(getattr(feature, "dtype", feature))
            _require_classes(column, feature, kind)
            named = _named_values(column, kind, distinct_values(dataset, column), recorded)
            if not recorded and kind not in _TEXTS:
                _require_repetition(column, len(named), len(dataset))
        names = list(recorded) if set(named.values()) <= set(recorded) else _in_order(named.values(), declared)
        id_of_name = {name: id_ for id_, name in enumerate(names)}
        return cls(names, {value: id_of_name[name] for value, name in named.items()})

    def __len__(self) -> int:
        return len(self.names)

    def id_of(self, value: Any) -> int | None:
        """Return the id of a stored value, or None if it is not a known class."""
        return self._ids.get(value)


def load_label_map(config: DataConfig, recorded: Sequence[str] = ()) -> LabelMap:
    """Read the classes from the whole stored training split, including rows that are held out or beyond
    `max_train_samples`.

    Args:
        recorded: see `LabelMap.of`.

    Raises:
        UserError: the data or the column do not exist, or the column does not hold classes.
    """
    return LabelMap.of(named_split(config, load_all_splits(config), config.train_split), config.label_column, recorded)


def label_problem(value: Any, names: Sequence[str]) -> str:
    """Return why a stored value is the label of no class."""
    if value is None or value == "" or value != value:  # only a float that is not a number differs from itself
        return "the label is missing"
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    return f"label {one_line(repr(value), 80)} is not one of the {len(names):,} classes ({shown})"


def _require_classes(column: str, feature: Any, kind: str) -> None:
    """Raise UserError for a column whose type cannot hold one class for each row."""
    import datasets

    if isinstance(feature, (list, datasets.List, datasets.LargeList)):
        raise UserError(
            f"column '{column}' holds {feature}, several labels for each image, but an image has one class; choose a "
            "column with one label for each row with --label_column, or write the labels into the captions"
        )
    if kind == "null":
        raise UserError(f"column '{column}' has no label in any row; choose another with --label_column")
    if kind not in _TEXTS and not kind.startswith(("bool", "int", "uint", "float")):
        raise UserError(
            f"column '{column}' holds {kind}, not classes (texts, whole numbers, true and false); choose another with "
            "--label_column"
        )


def _named_values(column: str, kind: str, values: Iterable[Any], recorded: Sequence[str]) -> dict[Any, str]:
    """Return the name of each distinct value that is not missing."""
    distinct = {value for value in values if value is not None and value != "" and value == value}
    if kind in _TEXTS:
        return {value: value for value in distinct}
    if kind == "bool":
        # Earlier versions named them by their numbers.
        numbers = bool(recorded) and set(recorded) <= {"0", "1"}
        return {value: str(int(value)) if numbers else str(value) for value in distinct}
    fractions = sorted(value for value in distinct if isinstance(value, float) and not value.is_integer())
    if fractions:
        raise UserError(
            f"column '{column}' holds {kind} with values such as {fractions[0]:g}, which are measurements, not "
            "classes; choose another with --label_column"
        )
    if sum(value < 0 for value in distinct) == 1:
        distinct.discard(-1)  # alone below 0, it usually says that a row has no label
    return {value: str(int(value)) for value in distinct}


def _require_repetition(column: str, classes: int, rows: int) -> None:
    if classes > max(_FEW_NUMBERS, rows // 2):
        raise UserError(
            f"column '{column}' has {classes:,} different numbers in {rows:,} rows, so most classes would have a "
            "single image; choose another column with --label_column, or store the numbers as texts"
        )


def _in_order(names: Iterable[str], declared: Sequence[str] | None) -> list[str]:
    """Return the names by id: whole numbers by their size, declared names as declared, others in alphabetical order."""
    distinct = list(declared) if declared else sorted(set(names))
    numbers = whole_numbers(distinct)
    return sorted(distinct, key=int) if numbers else distinct
