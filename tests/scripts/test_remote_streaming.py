"""Training on shards at URLs as users start it: the same weights as on local shards, also if the server is not well."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.tools.cli import UserError
from tests.conftest import forget_accelerate
from tests.data.test_remote_shards import PATTERNS, restart
from tests.data.test_shards import MAKERS
from tests.scripts.test_streaming import FLAGS, train
from tests.support.runs import assert_same_state, sigterm_in_step
from tests.support.shard_server import ShardServer, server
from training import train_latent_diffusion
from training.data.shards import places, remote, tables

__all__ = ["server"]
STEPS = ("--validation_fraction", "0", "--max_train_steps", "16", "--preview_epochs", "0")
# A window of rows is kept in memory, and not all rows: they are received while the run trains.
KEPT_BYTES = {"tar": 60_000, "parquet": 23_000}


@pytest.fixture(autouse=True)
def short_pauses(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(remote, "PAUSES", (0.01,) * 4)
    monkeypatch.setattr(remote, "PAUSES_AT_START", (0.01,) * 3)
    monkeypatch.setattr(tables, "BLOCK_ROWS", 4)
    restart()


@contextmanager
def server_gone_in_step(step: int, server: ShardServer, monkeypatch):
    phase = train_latent_diffusion.LatentDiffusionPhase
    forward = phase.forward

    def stopped(self, batch, draws):
        if draws.step == step:
            places.forget()
            server.stop()
        return forward(self, batch, draws)

    with monkeypatch.context() as patched:
        patched.setattr(phase, "forward", stopped)
        yield
    server.start()


def interrupted(folder: Path, *flags: str) -> int:
    forget_accelerate()
    restart()
    return train_latent_diffusion.main([*FLAGS, "--output_dir", str(folder), *flags])


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_weights_as_on_local_shards(tmp_path, server, monkeypatch, kind):
    """From a flaky server; and with a server that is gone in step 3 of the first epoch, and a SIGTERM in step 9."""
    near = train(tmp_path / "near", *STEPS, "--dataset_name", str(MAKERS[kind](tmp_path / "shards")))
    monkeypatch.setattr(places, "KEPT_BYTES", KEPT_BYTES[kind])
    far = (*STEPS, "--dataset_name", f"{server.url}/{PATTERNS[kind]}")
    restart()
    server.flaky = True
    assert_same_state(train(tmp_path / "far", *far), near)
    assert {answer.status for answer in server.answers} == {206, 503}
    server.flaky = False
    parts = tmp_path / "parts"
    with (
        server_gone_in_step(3, server, monkeypatch),
        pytest.raises(UserError, match=r"5 times\); check the network and the server, and run the command again"),
    ):
        interrupted(parts, *far)
    assert (parts / "checkpoints/latest").resolve().name.endswith("4")  # nothing of the run is lost
    with sigterm_in_step(9, train_latent_diffusion.LatentDiffusionPhase, monkeypatch):
        assert interrupted(parts, *far) == 75
    restart()
    assert_same_state(train(parts, *far), near)


@pytest.mark.slow
def test_a_resumed_run_is_told_that_a_shard_has_changed(tmp_path, server, monkeypatch):
    folder = MAKERS["tar"](tmp_path / "shards")
    far = (*STEPS, "--dataset_name", f"{server.url}/{PATTERNS['tar']}")
    with sigterm_in_step(2, train_latent_diffusion.LatentDiffusionPhase, monkeypatch):
        assert interrupted(tmp_path / "run", *far) == 75
    shards = [folder / f"0000{i}.tar" for i in range(3)]
    contents = [shard.read_bytes() for shard in shards]
    for shard, content in zip(shards, (contents[1], contents[0], contents[2]), strict=True):
        shard.write_bytes(content)
    with pytest.raises(UserError, match="the data of the run in .* had another content"):
        interrupted(tmp_path / "run", *far)
    server.statuses["/00001.tar"] = 404
    with pytest.raises(UserError, match=f"{server.url}/00001.tar cannot be read: it does not exist"):
        interrupted(tmp_path / "run", *far)
