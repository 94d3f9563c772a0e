"""A run that diverges keeps its good checkpoints, and the same command with a lower learning rate resumes from them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pipelines.tools.cli import UserError
from tests.support.runs import rows, tensors
from tests.support.toy_runs import EVERY_STEP, assert_equal, column, run, snapshot, state_of
from training.run import checkpoint

GOOD = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "2", "--validation_steps", "1")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "run"
    assert run(folder, *GOOD, "--max_train_steps", "4") == 0
    return folder


@pytest.fixture
def folder(tmp_path, good) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run", symlinks=True))


@pytest.mark.parametrize("use_ema", ["true", "false"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, use_ema):
    """The first update makes them infinite, before any loss is: it is divided by 1 - 0.9999^5, and exceeds 3.4e38."""
    folder = tmp_path / "run"
    run(folder, *GOOD, "--max_train_steps", "4", "--use_ema", use_ema)
    before, links = (
        snapshot(folder / "checkpoints"),
        [os.readlink(folder / "checkpoints" / n) for n in ("latest", "best")],
    )
    flags = (*GOOD, "--num_train_epochs", "3", "--use_ema", use_ema)
    message = r"weights of denoiser.* are not finite after step 5.*`latest` \(step-00000004\).*Lower --learning_rate"
    with pytest.raises(UserError, match=message):
        run(folder, *flags, "--learning_rate", "1e38", "--adam_beta1", "0.9999")
    assert snapshot(folder / "checkpoints") == before
    assert [os.readlink(folder / "checkpoints" / name) for name in ("latest", "best")] == links
    assert run(folder, *flags) == 0
    assert all(tensor.isfinite().all() for tensor in tensors(folder).values())
    assert rows(folder)[-1]["step"] == "18"


def test_weights_that_only_give_an_infinite_loss_are_left(folder, good):
    """They are finite, and are saved after the update that ruined them; the run returns to the checkpoint before it."""
    flags = (*GOOD, "--num_train_epochs", "4", "--max_nonfinite_steps", "3")
    with pytest.raises(UserError, match=r"3 steps in a row .*`latest` \(step-00000004\).*resumes from `latest`"):
        run(folder, *flags, "--learning_rate", "1e25")
    assert os.readlink(folder / "checkpoints/latest") == "step-00000004"
    assert_equal(tensors(folder), tensors(good))
    assert "so this step is not the best one" in (folder / "run.log").read_text()
    best = checkpoint.step_of((folder / "checkpoints/best").resolve())
    assert best <= 4
    assert run(folder, *flags) == 0
    assert "resumed from step-00000004 at step 4" in (folder / "run.log").read_text()
    assert all(tensor.isfinite().all() for tensor in tensors(folder).values())
    assert max(column(folder, "val_loss")) < 2
    assert [row["step"] for row in rows(folder)] == [str(step) for step in range(1, 25)]
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*"))[-2:] == [
        "step-00000023",
        "step-00000024",
    ]


def test_good_checkpoints_are_kept_while_the_loss_is_not_finite(folder):
    """Ten checkpoints of the ruined weights would otherwise take the places of the two that are kept."""
    flags = (*GOOD, "--num_train_epochs", "4", "--checkpoints_total_limit", "1")
    with pytest.raises(UserError, match=r"10 steps in a row"):
        run(folder, *flags, "--learning_rate", "1e25")
    assert checkpoint.is_undamaged(folder / "checkpoints/latest")
    assert state_of(folder)["step"] <= 5
    assert all(tensor.isfinite().all() for tensor in tensors(folder).values())


def test_a_bad_row_does_not_cost_checkpoints(tmp_path):
    """A few steps whose data are not finite do not count as divergence."""
    assert run(tmp_path / "run", *GOOD, "--bad_rows", "[3]", *EVERY_STEP, "--num_train_epochs", "2") == 0
    assert os.readlink(tmp_path / "run/checkpoints/latest") == "step-00000012"
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 12


def test_a_validation_that_is_never_finite_exports_the_last_weights(tmp_path):
    """After an early stop the best weights are exported, and here there are none."""
    folder = tmp_path / "run"
    flags = ("--validation_steps", "1", "--early_stopping_patience", "3", "--bad_validation", "true", *EVERY_STEP)
    assert run(folder, *flags) == 0
    log = (folder / "run.log").read_text()
    assert log.count("val_loss is nan at step") == 3
    assert state_of(folder)["best_value"] is None
    name = "unet/diffusion_pytorch_model.safetensors"
    assert_equal(
        checkpoint.load_tensors(folder / "pipeline" / name),
        checkpoint.load_tensors(folder / "checkpoints/latest/pipeline" / name),
    )


def test_going_back_needs_an_earlier_checkpoint(tmp_path):
    for step in (3, 5, 7):
        checkpoint.checkpoint_of_step(tmp_path, step).mkdir()
        checkpoint.link(tmp_path, "latest", checkpoint.checkpoint_of_step(tmp_path, step))
    assert checkpoint.step_back(tmp_path, 8) is None
    assert checkpoint.step_back(tmp_path, 6).name == "step-00000005"
    assert checkpoint.step_back(tmp_path, 6) is None
    assert checkpoint.step_back(tmp_path, 3) is None
    assert os.readlink(tmp_path / "latest") == "step-00000005"
