"""Checkpoints are written atomically, verified and pruned."""

from __future__ import annotations

import logging

import pytest
import torch

from pipelines.tools.cli import UserError
from training.run import checkpoint
from training.run.recovery import clear_leftovers


def write(folder, step, text="weights"):
    folder.mkdir(exist_ok=True)

    def fill(target):
        (target / checkpoint.STATE_FILE).write_text(f'{{"step": {step}}}')
        (target / "a.bin").write_text(text)
        (target / "pipeline").mkdir()
        (target / "pipeline" / "b.bin").write_text(text * 2)

    return checkpoint.write_checkpoint(folder, step, fill)


def test_the_newest_by_step_is_found_and_linked(tmp_path):
    write(tmp_path, 9)
    newest = write(tmp_path, 10)
    assert checkpoint.find_checkpoint(tmp_path, "latest") == newest
    assert (tmp_path / "latest").resolve() == newest
    assert checkpoint.find_checkpoint(tmp_path / "none", "latest") is None


@pytest.mark.parametrize("harm", ["truncate", "change", "delete", "manifest"])
def test_a_damaged_one_is_skipped_with_a_warning(tmp_path, caplog, harm):
    older, newest = write(tmp_path, 1), write(tmp_path, 2)
    file = newest / "pipeline" / "b.bin"
    if harm == "truncate":
        file.write_text("w")
    elif harm == "change":
        file.write_text("Weightsweights")
    elif harm == "delete":
        file.unlink()
    else:
        (newest / checkpoint.MANIFEST).write_text("{")
    logging.getLogger("halftone").propagate = True
    with caplog.at_level(logging.WARNING, logger="halftone"):
        assert checkpoint.find_checkpoint(tmp_path, "latest") == older
    assert "step-00000002 is damaged" in caplog.text


def test_a_damaged_one_named_by_path_is_an_error(tmp_path):
    newest = write(tmp_path, 2)
    (newest / "a.bin").write_text("x")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.find_checkpoint(tmp_path, str(newest))
    with pytest.raises(UserError, match="every checkpoint"):
        checkpoint.find_checkpoint(tmp_path, "latest")
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.find_checkpoint(tmp_path, "best")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    older = write(tmp_path, 1)

    def fail(target):
        (target / "a.bin").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_checkpoint(tmp_path, 2, fail)
    assert checkpoint.find_checkpoint(tmp_path, "latest") == older
    assert not list(tmp_path.glob(".*"))


def test_leftovers_of_a_killed_process_are_deleted_and_a_replaced_checkpoint_is_restored(tmp_path):
    whole = write(tmp_path, 5)
    (tmp_path / ".writing-step-00000006").mkdir()
    whole.rename(tmp_path / ".replaced-step-00000005")  # killed between the two renames
    clear_leftovers(tmp_path)
    assert checkpoint.find_checkpoint(tmp_path, "latest") == whole
    assert not list(tmp_path.glob(".writing*"))


def test_pruning_keeps_the_newest_and_best(tmp_path):
    folders = [write(tmp_path, step) for step in range(1, 6)]
    checkpoint.link(tmp_path, "best", folders[1])
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(f.name for f in tmp_path.glob("step-*")) == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_step_is_written_again_over_an_older_one(tmp_path):
    write(tmp_path, 3, "old")
    again = write(tmp_path, 3, "new")
    assert (again / "a.bin").read_text() == "new"
    assert checkpoint.find_checkpoint(tmp_path, "latest") == again


def test_tied_weights_are_saved(tmp_path):
    tensor = torch.randn(3, 3)
    checkpoint.save_tensors({"a": tensor, "b": tensor, "c": tensor.T}, tmp_path / "t.safetensors")
    loaded = checkpoint.load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(loaded["a"], tensor)
    assert torch.equal(loaded["b"], tensor)
    assert torch.equal(loaded["c"], tensor.T)
