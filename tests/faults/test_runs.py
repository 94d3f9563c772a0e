"""Nothing is lost, and messages name the cause: the short forms of the trials in trials_runs.py."""

from __future__ import annotations

import pytest

from tests.faults import trials_runs
from tests.faults.table import trials_of, wrong_in


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", trials_of(trials_runs))
def test_nothing_is_lost(lab, name):
    assert wrong_in(name, lab) == []
