"""A run that was interrupted and resumed is bit-identical to an uninterrupted one."""

from __future__ import annotations

import json
import shutil

import pytest

from pipelines.tools.cli import UserError
from tests.support.runs import assert_same_state, rows, tensors
from tests.support.toy import main as toy_main

# 48 samples, and global batches of 8 (two micro-batches of 4): 6 steps per epoch.
COMMON = (
    "--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--logging_steps", "4", "--validation_steps", "5",
    "--checkpointing_epochs", "0", "--checkpointing_steps", "1", "--checkpoints_total_limit", "50", "--critic", "true",
    "--lr_warmup_steps", "3", "--num_train_epochs", "3", "--ema_update_every", "2",
)  # fmt: skip


def run(output_dir, *flags):
    assert (
        toy_main(["--output_dir", str(output_dir), "--report_to", "none", "--cpu_threads", "1", *COMMON, *flags]) == 0
    )


def stop_at(output_dir, step):
    """Make a run as if it had been killed: with checkpoints up to `step`, and rows of metrics of later steps."""
    run(output_dir)
    cut_after(output_dir, step)


def cut_after(output_dir, step):
    for folder in (output_dir / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(output_dir / "pipeline", ignore_errors=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder)
    return folder


@pytest.mark.parametrize("step", [4, 6, 9], ids=["mid-epoch", "epoch's end", "second epoch"])
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, step):
    stop_at(tmp_path / "run", step)
    run(tmp_path / "run")
    assert_same_state(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_resumed_twice_equals_uninterrupted(tmp_path, uninterrupted):
    stop_at(tmp_path / "run", 4)
    run(tmp_path / "run")
    cut_after(tmp_path / "run", 13)
    run(tmp_path / "run")
    assert_same_state(tmp_path / "run", uninterrupted)


def test_two_sessions_equal_one(tmp_path, uninterrupted):
    """Two epochs now and one later equal three epochs, if the schedule does not depend on the total."""
    run(tmp_path / "run", "--num_train_epochs", "2")
    run(tmp_path / "run", "--num_train_epochs", "3")
    # The first session validates at its end, which is the end of an epoch, so no row is added.
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == sorted(set(steps), key=int)
    a, b = tensors(tmp_path / "run"), tensors(uninterrupted)
    assert all((a[name] == b[name]).all() for name in b)


@pytest.mark.parametrize("where", ["validation", "previews"])
def test_a_stop_inside_events_is_saved_and_resumed(tmp_path, uninterrupted, where):
    flags = ["--output_dir", str(tmp_path / "run"), "--report_to", "none", "--cpu_threads", "1", *COMMON]
    assert toy_main([*flags, "--signal_at", where]) == 75
    state = json.loads((tmp_path / "run/checkpoints/latest/trainer_state.json").read_text())
    assert state["pending_events"]
    run(tmp_path / "run")
    a, b = rows(tmp_path / "run"), rows(uninterrupted)
    assert a == b


def test_data_that_cannot_be_read_for_previews_cost_no_step(tmp_path, uninterrupted):
    flags = ["--output_dir", str(tmp_path / "run"), "--report_to", "none", "--cpu_threads", "1", *COMMON]
    rare = ["--checkpointing_steps", "0", "--preview_steps", "5"]
    with pytest.raises(UserError, match="an image of the previews is truncated"):
        toy_main([*flags, *rare, "--broken_previews", "true"])
    assert (tmp_path / "run/checkpoints/step-00000005").is_dir()
    run(tmp_path / "run")
    assert rows(tmp_path / "run") == rows(uninterrupted)


def test_samples_that_cannot_be_made_for_the_export_are_made_by_the_same_command(tmp_path, uninterrupted):
    run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/pipeline")
    flags = ["--output_dir", str(tmp_path / "run"), "--report_to", "none", "--cpu_threads", "1", *COMMON]
    with pytest.raises(UserError, match=r"could not be exported \(an image of the previews is truncated\); the check"):
        toy_main([*flags, "--broken_previews", "true"])
    assert not (tmp_path / "run/pipeline").exists()
    run(tmp_path / "run")
    assert (tmp_path / "run/pipeline/model_index.json").is_file()


def test_extra_epochs_count_from_where_the_run_stands(tmp_path):
    run(tmp_path / "run", "--num_train_epochs", "1")
    run(tmp_path / "run", "--extra_epochs", "2")
    assert rows(tmp_path / "run")[-1]["step"] == "18"
