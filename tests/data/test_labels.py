"""Labels as people store them: texts, whole numbers, truth values, with gaps and with missing values."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow
import pytest
from PIL import Image

from data_scripts import check_dataset
from pipelines.common.conditions import class_ids
from pipelines.tools.cli import UserError
from training.core.draws import SampleKey
from training.data import source
from training.data.classes import column_classes
from training.data.images import DataConfig, ImageDataset, LabelMap, load_label_map, load_split

YEARS = list(range(1985, 2021))


def label_map(values: list, kind: pyarrow.DataType | None = None, recorded: tuple[str, ...] = ()) -> LabelMap:
    table = pyarrow.table({"label": pyarrow.array(values, kind)})
    return LabelMap.of(datasets.Dataset(table), "label", recorded)


def parquet(file: Path, labels: list, kind: pyarrow.DataType | None = None) -> DataConfig:
    """Write a row for each label, and return the config of a process that starts now."""
    folder = file.parent
    rows = []
    for i in range(len(labels)):
        Image.new("RGB", (16, 16), (7 * i % 256, 99, 3)).save(folder / f"{i}.png")
        rows.append({"bytes": (folder / f"{i}.png").read_bytes(), "path": None})
        (folder / f"{i}.png").unlink()
    texts = [f"image {i}" for i in range(len(labels))]
    table = pyarrow.table({"image": rows, "text": texts, "label": pyarrow.array(labels, kind)})
    features = datasets.Features.from_arrow_schema(table.schema)
    features["image"] = datasets.Image()
    datasets.Dataset(table.cast(features.arrow_schema)).to_parquet(str(file))
    source._open_source.cache_clear()
    return DataConfig(dataset_name=str(file), validation_fraction=0, resolution=16)


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        (YEARS[::-1] * 2, pyarrow.int64(), [str(year) for year in YEARS]),
        ([0, 3, 1], pyarrow.int32(), ["0", "1", "3"]),
        ([0, 10_000_000], pyarrow.int64(), ["0", "10000000"]),
        ([-1, 2, -3], pyarrow.int8(), ["-3", "-1", "2"]),
        ([200, 3], pyarrow.uint8(), ["3", "200"]),
        ([1985.0, None, float("nan"), 7.0], pyarrow.float64(), ["7", "1985"]),
        ([2.0, 1.0], pyarrow.float32(), ["1", "2"]),
        (["100", "2", "10"], pyarrow.string(), ["2", "10", "100"]),
        (["100", "2", "ten"], pyarrow.large_string(), ["100", "2", "ten"]),
        (["b", "", "a", None], pyarrow.string(), ["a", "b"]),
        ([True, False, None], pyarrow.bool_(), ["False", "True"]),
    ],
)
def test_the_classes_are_the_distinct_values(values, kind, names):
    classes = label_map(values, kind)
    assert classes.names == names
    for value in values:
        missing = value is None or value == "" or value != value
        id_ = classes.id_of(value)
        assert id_ is None if missing else classes.names[id_] == str(int(value) if isinstance(value, float) else value)


def test_declared_names_stand_and_whole_numbers_among_them_have_their_order():
    def declared(*names: str) -> LabelMap:
        features = datasets.Features({"label": datasets.ClassLabel(names=list(names))})
        return LabelMap.of(datasets.Dataset.from_dict({"label": [0, 1, 2]}, features), "label")

    assert declared("dog", "cat", "bird").names == ["dog", "cat", "bird"]
    numbers = declared("1", "10", "2")  # as folders are listed
    assert numbers.names == ["1", "2", "10"]
    assert [numbers.id_of(i) for i in range(3)] == [0, 2, 1]
    assert numbers.id_of(-1) is None


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([["a", "b"], ["c"]], None, "several labels for each image, but an image has one class"),
        ([0.5, 1.5], pyarrow.float64(), "values such as 0.5, which are measurements"),
        ([float("inf"), 1.0], pyarrow.float64(), "values such as inf"),
        ([None, None], None, "has no label in any row"),
        ([b"a", b"b"], pyarrow.binary(), "holds binary, not classes"),
        (list(range(400)), pyarrow.int64(), "400 different numbers in 400 rows"),
    ],
)
def test_columns_without_classes_are_refused(values, kind, message):
    with pytest.raises(UserError, match=message) as error:
        label_map(values, kind)
    assert "column 'label'" in str(error.value)
    assert "--label_column" in str(error.value)


def test_a_recorded_numbering_stands_if_it_covers_the_classes():
    """Earlier versions numbered integers from 0 to the largest, texts by the alphabet, and truth values 0 and 1."""
    earlier = tuple(str(i) for i in range(6))
    gaps = label_map([1, 5, 3], pyarrow.int64(), earlier)
    assert gaps.names == list(earlier)
    assert [gaps.id_of(value) for value in (1, 5, 3, 4)] == [1, 5, 3, None]
    texts = label_map(["2", "10"], pyarrow.string(), ("10", "2"))
    assert [texts.id_of("10"), texts.id_of("2")] == [0, 1]
    truth = label_map([True, False], pyarrow.bool_(), ("0", "1"))
    assert truth.names == ["0", "1"]
    assert [truth.id_of(False), truth.id_of(True)] == [0, 1]
    assert label_map([1, 7], pyarrow.int64(), earlier).names == ["1", "7"]


def test_missing_labels_are_listed_by_row_and_can_be_skipped(tmp_path, capsys):
    config = parquet(tmp_path / "years.parquet", [1985.0, None, 1990.0, float("nan")], pyarrow.float64())
    assert check_dataset.main(["--dataset_name", config.dataset_name or "", "--validation_fraction", "0"]) == 2
    output = capsys.readouterr().out
    assert "2 classes: 1985 1, 1990 1" in output
    assert [line for line in output.splitlines() if "the label is missing" in line] == [
        "  train row 1, column 'label': the label is missing",
        "  train row 3, column 'label': the label is missing",
    ]
    config.on_bad_sample = "skip"
    rows = ImageDataset(load_split(config, "train", 0), config, labels=True, label_map=load_label_map(config))
    assert [rows[SampleKey(i, 0)]["label"] for i in range(4)] == [0, 1, 1, 0]


def test_whole_floats_are_classes_to_balance_by():
    classes = column_classes(datasets.Dataset.from_dict({"year": [2020.0, 1985.0, 2020.0]}), "year")
    assert (classes.ids.tolist(), classes.names) == ([1, 0, 1], ["1985", "2020"])
    with pytest.raises(UserError, match="1 of 2 rows have no class in column 'year'"):
        column_classes(datasets.Dataset.from_dict({"year": [2020.0, float("nan")]}), "year")
    with pytest.raises(UserError, match="holds float64, not classes"):
        column_classes(datasets.Dataset.from_dict({"year": [2020.5, 1985.0]}), "year")


def test_a_label_of_no_class_is_named_with_the_classes(tmp_path):
    config = parquet(tmp_path / "years.parquet", [1985, 1990])
    names = LabelMap(["1", "2"], {1: 0, 2: 1})
    rows = ImageDataset(load_split(config, "train", 0), config, labels=True, label_map=names)
    assert [str(problem) for problem in rows.quick_problems({"text": "a", "label": 1985})] == [
        "label 1985 is not one of the 2 classes (1, 2)"
    ]


# --- class labels that are given to a pipeline


def test_an_integer_is_a_name_where_all_names_are_whole_numbers():
    years = {str(id_): str(year) for id_, year in enumerate(YEARS)}
    assert class_ids([1985, "1986", 2020], years, len(YEARS)) == [0, 1, 35]
    with pytest.raises(ValueError, match=r"has 0, which is not a class of this model; its classes are 1985, 1986"):
        class_ids(0, years, len(YEARS))
    assert class_ids([7, 12], {"0": "07", "1": "12"}, 2) == [0, 1]
    assert class_ids(-1, {"0": "-1", "1": "1"}, 2) == [0]


def test_an_integer_is_an_id_where_names_are_texts_or_there_are_none():
    assert class_ids([1, "cat"], {"0": "cat", "1": "9"}, 2) == [1, 0]
    assert class_ids([1], {}, 2) == [1]
    with pytest.raises(ValueError, match="must be from 0 to 1, but has 9"):
        class_ids(9, {"0": "cat", "1": "9"}, 2)
