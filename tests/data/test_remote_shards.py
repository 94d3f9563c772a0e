"""Shards at URLs: the same rows as of local shards, few requests, nothing on the disk, and errors that name the URL."""

from __future__ import annotations

import pytest
import torch

from tests.data.test_shards import MAKERS, ROWS, SHARDS, opened
from tests.support.shard_server import server
from training.core.draws import SampleKey
from training.data import source
from training.data.checks import scan
from training.data.fingerprints import dataset_fingerprint
from training.data.shards import places, remote

__all__ = ["server"]
PATTERNS = {"tar": "{00000..00002}.tar", "parquet": "train-{00000..00002}.parquet"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(remote, "PAUSES", (0.01,) * 4)
    monkeypatch.setattr(remote, "PAUSES_AT_START", (0.01,) * 3)
    restart()


def restart() -> None:
    """Forget what this process knows, as a new one."""
    source._open_source.cache_clear()
    places.forget()


def rows(data) -> list[dict]:
    return [data[SampleKey(i, 0)] for i in range(len(data))]


@pytest.mark.parametrize("kind", MAKERS)
def test_remote_rows_equal_local_ones(tmp_path, server, kind):
    folder = MAKERS[kind](tmp_path / "shards")
    far, near = opened(f"{server.url}/{PATTERNS[kind]}"), opened(folder)
    assert len(far) == SHARDS * ROWS
    for one, other in zip(rows(far), rows(near), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert (one["caption"], one["label"]) == (other["caption"], other["label"])
    assert dataset_fingerprint(far) == dataset_fingerprint(near)
    assert scan(far).complete
