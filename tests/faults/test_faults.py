"""Every fault of docs/reliability.md, produced in real processes: nothing is lost, and the message names the cause."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import kinds, trials_data, trials_hub, trials_runs  # noqa: F401 - they register their trials
from tests.faults.lab import Lab
from tests.faults.table import TRIALS


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab") / "short", thorough=False) as opened:
        yield opened


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=getattr(pytest.mark, trial.mark)) for name, trial in TRIALS.items()]
)
def test_nothing_is_lost(lab, name):
    rows = list(TRIALS[name].rows(lab))
    assert rows
    assert all(row.tried for row in rows)
    wrong = [line for row in rows for line in row.wrong]
    assert not wrong, "\n".join(wrong)
