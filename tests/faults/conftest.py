"""The short form of every trial, as a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("faults") / "lab") as opened:
        yield opened
