"""Saved models that several tests of the pipelines' commands generate with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.test_poster_decoder import tiny_decoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "pipeline"
    tiny_decoder().save_pretrained(folder)
    return folder
