"""Nothing is lost, and messages name the cause: the short forms of the trials in kinds.py."""

from __future__ import annotations

import pytest

from tests.faults import kinds
from tests.faults.table import trials_of, wrong_in


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", trials_of(kinds))
def test_nothing_is_lost(lab, name):
    assert wrong_in(name, lab) == []
