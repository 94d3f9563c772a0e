"""--balance_by: class shares of an epoch, rows that take turns, reproducible draws, and error messages."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from pipelines.tools.cli import UserError
from tests.support.toy_runs import LAYOUT, assert_equal, run, tensors_of
from training.core.classes import RowClasses
from training.core.layout import BatchLayout
from training.data.classes import column_classes
from training.data.images import DataConfig, ImageDataset
from training.data.source import load_split
from training.engine.balance import BalanceConfig, balanced_strata
from training.engine.sampler import StepSampler, Strata, StratifiedDraw, _permutation

COUNTS = (600, 300, 75, 20, 5)  # 1,000 rows in five classes
# The 0.999 quantile of the chi-square distribution with 4 degrees of freedom.
CHI_SQUARE_4_LIMIT = 18.47


class Rows:
    """Training data with the classes that balancing needs; the rows of the classes are mixed."""

    def __init__(self, counts=COUNTS):
        ids = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
        self.ids = ids[_permutation(len(ids), "rows")]
        self.names = [f"class {i}" for i in range(len(counts))]

    def classes(self, column):
        return RowClasses(self.ids, self.names)


def weights(power: float) -> torch.Tensor:
    """Compute the shares by their definition: the sum of n_c^-p over the rows of each class."""
    per_row = torch.tensor([count**-power for count in COUNTS for _ in range(count)], dtype=torch.float64)
    per_class = torch.stack([part.sum() for part in per_row.split(COUNTS)])
    return per_class / per_class.sum()


def drawn(power: float, seed: int, epoch: int, batch: int = 50) -> torch.Tensor:
    """Return the rows of an epoch, as drawn by the sampler."""
    data = Rows()
    strata = balanced_strata(data, BalanceConfig("kind", power))
    sampler = StepSampler(len(data.ids), BatchLayout(batch), seed, strata=strata)
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    return torch.tensor([key.index for step in steps for key in sampler.keys(step, 0)])


def chi_square(observed: torch.Tensor, shares: torch.Tensor) -> float:
    expected = shares * observed.sum()
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_class_shares_of_an_epoch_match_the_weights(power, seed):
    ids = Rows().ids
    for epoch in (0, 7):
        observed = torch.bincount(ids[drawn(power, seed, epoch)], minlength=5)
        assert chi_square(observed, weights(power)) < CHI_SQUARE_4_LIMIT
        assert (observed - 1000 * weights(power)).abs().max() < 1  # systematic resampling is exact up to rounding
        for wrong in {0.0, 0.25, 0.5, 1.0} - {power}:  # the test fails for other powers
            assert chi_square(observed, weights(wrong)) > CHI_SQUARE_4_LIMIT


def test_classes_are_spread_over_an_epoch():
    """The counts of each class in each tenth of an epoch vary as in a random shuffle, neither more nor less."""
    ids = Rows().ids
    statistics = []
    for epoch in range(20):
        table = torch.stack([torch.bincount(ids[part], minlength=5) for part in drawn(1.0, 0, epoch).chunk(10)])
        statistics.append(chi_square(table, torch.full_like(table, 1 / 50, dtype=torch.float64)))
    # 36 degrees of freedom: mean 36, standard deviation 8.5. The mean of 20 statistics is within four of its
    # standard deviations.
    assert sum(statistics) / 20 == pytest.approx(36, abs=4 * 8.5 / 20**0.5)


def test_rows_of_a_class_take_turns():
    """After any number of epochs, the numbers of draws of two rows of a class differ by at most 1."""
    ids = Rows().ids
    seen = torch.zeros(1000, dtype=torch.int64)
    for epoch in range(6):
        seen += torch.bincount(drawn(1.0, 3, epoch), minlength=1000)
        for group in range(5):
            of_class = seen[ids == group]
            assert of_class.max() - of_class.min() <= 1
    assert seen[ids == 0].float().mean() == pytest.approx(6 * 200 / 600, abs=0.02)


def test_expected_counts_are_exact_on_average():
    draw = StratifiedDraw(Strata(torch.tensor([0, 1, 2] * 5), torch.tensor([0.11, 0.31, 0.58]).double()), 15, seed=0)
    counts = torch.stack([draw.counts(epoch) for epoch in range(2000)])
    assert (counts.sum(1) == 15).all()
    torch.testing.assert_close(
        counts.double().mean(0), 15 * torch.tensor([0.11, 0.31, 0.58]).double(), atol=0.05, rtol=0
    )


def test_power_0_gives_the_permutation_without_balancing():
    data = Rows()
    assert balanced_strata(data, BalanceConfig("kind", 0.0)) is None
    plain = StepSampler(1000, BatchLayout(50), 0)
    assert [k.index for step in range(20) for k in plain.keys(step, 0)] == drawn(0.0, 0, 0).tolist()
    assert drawn(0.0, 0, 0).tolist() == _permutation(1000, 0, "order", 0).tolist()


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    """Epochs may be asked for in any order, e.g. when a resumed run begins in the middle."""
    strata = balanced_strata(Rows(), BalanceConfig("kind", 1.0))
    forward, jumping = StratifiedDraw(strata, 950, 4), StratifiedDraw(strata, 950, 4)
    orders = [forward.order(epoch) for epoch in range(6)]
    for epoch in (5, 2, 4, 0, 5):
        assert torch.equal(jumping.order(epoch), orders[epoch])
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(StratifiedDraw(strata, 950, 5).order(0), orders[0])


@pytest.mark.parametrize(("batch", "processes", "accumulation"), [(4, 2, 1), (2, 2, 2), (1, 3, 8), (4, 1, 6)])
def test_the_same_draw_on_any_split_of_the_global_batch(batch, processes, accumulation):
    size = batch * processes * accumulation
    strata = balanced_strata(Rows(), BalanceConfig("kind", 1.0))
    whole = StepSampler(1000, BatchLayout(size), 2, strata=strata)
    for step in (0, 1000 // size + 3):
        keys = {}
        for rank in range(processes):
            layout = BatchLayout(batch, processes, accumulation, rank)
            sampler = StepSampler(1000, layout, 2, strata=strata)
            for micro_batch in range(accumulation):
                keys |= dict(zip(layout.positions(micro_batch), sampler.keys(step, micro_batch), strict=True))
        assert [keys[position] for position in sorted(keys)] == whole.keys(step, 0)


# --- where classes come from -----------------------------------------------------------------------------------------


def table(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("values", "names"),
    [(["b", "a", "b"], ["a", "b"]), ([7, 2, 7], ["2", "7"]), ([True, False, True], ["False", "True"])],
)
def test_classes_are_the_distinct_values(values, names):
    classes = column_classes(table(kind=values), "kind")
    assert classes.names == names
    assert classes.ids.tolist() == [1, 0, 1]


def image_data(folder: Path, **columns) -> datasets.Dataset:
    rows = len(next(iter(columns.values())))
    images = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(rows)]
    features = datasets.Features(
        image=datasets.Image(), kind=datasets.ClassLabel(names=["a", "b", "c"]), text=datasets.Value("string")
    )
    data = datasets.Dataset.from_dict({"image": images, "text": ["x"] * rows, **columns}, features=features)
    data.to_parquet(folder / "train.parquet")
    config = DataConfig(dataset_name=str(folder / "train.parquet"), resolution=8, validation_fraction=0)
    return ImageDataset(load_split(config, "train", 0), config, captions=False)


def test_images_are_balanced_by_any_column(tmp_path, caplog):
    data = image_data(tmp_path, kind=[0] * 6 + [1] * 3 + [2])
    with caplog.at_level(logging.INFO, "halftone"):
        strata = balanced_strata(data, BalanceConfig("kind", 1.0))
    assert strata.group_of_row.tolist() == [0] * 6 + [1] * 3 + [2]
    torch.testing.assert_close(strata.shares, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert "a 60 → 33.3 %, b 30 → 33.3 %, c 10 → 33.3 %" in caplog.text


def test_many_classes_are_summarized(caplog):
    with caplog.at_level(logging.INFO, "halftone"):
        balanced_strata(Rows([100 - i for i in range(40)]), BalanceConfig("kind", 0.5))
    assert "class 0 " in caplog.text
    assert "class 39 " in caplog.text
    assert "… 28 more …" in caplog.text


def test_mistakes_are_user_errors(tmp_path):
    data = image_data(tmp_path, kind=[0, 0, 1, 1])
    with pytest.raises(UserError, match="no column 'knid'; did you mean 'kind'.*--balance_by"):
        balanced_strata(data, BalanceConfig("knid", 1.0))
    with pytest.raises(UserError, match="'c' of its 3 classes has no sample in the training data"):
        balanced_strata(data, BalanceConfig("kind", 1.0))
    with pytest.raises(UserError, match=r"float64, not classes; choose another with --balance_by"):
        column_classes(table(kind=[0.5, 1.0]), "kind")
    with pytest.raises(UserError, match="2 of 3 rows have no class in column 'kind'"):
        column_classes(table(kind=["a", None, ""]), "kind")
    with pytest.raises(UserError, match="--balance_by kind: list has no columns"):
        balanced_strata([], BalanceConfig("kind", 1.0))


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_draws_weighted_samples_and_resumes_exactly(tmp_path):
    flags = ("--balance_by", "kind", "--num_train_epochs", "2")
    assert run(tmp_path / "whole", *flags) == 0
    assert run(tmp_path / "parts", *flags, "--signal_step", "9") == 75
    assert run(tmp_path / "parts", *flags) == 0
    assert_equal(*(tensors_of(tmp_path / name / "checkpoints/latest") for name in ("parts", "whole")))
    assert run(tmp_path / "plain", "--num_train_epochs", "2") == 0
    weights = [tensors_of(tmp_path / name / "checkpoints/latest", "phase_*") for name in ("plain", "whole")]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert LAYOUT.global_batch_size == 8  # 48 rows, of which 6 are rare: they are half of the draws of each epoch


@pytest.mark.parametrize("power", ["-0.1", "1.5"])
def test_powers_out_of_range_are_refused(tmp_path, power):
    with pytest.raises(UserError, match=r"--balance_power is .*\[0, 1\]"):
        run(tmp_path / "run", "--balance_by", "kind", "--balance_power", power)
