"""The best checkpoint is held in memory and written with the next one; training is bit for bit the same with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.tools.cli import UserError
from tests.faults.compare import contents
from tests.support.child import wait_until
from tests.support.runs import TOY, assert_same_state, command, environment, rows, toy
from tests.support.toy import ToyConfig, ToyStage
from tests.support.toy_runs import COMMON, assert_equal, column, run, state_of, tensors_of
from training.engine import saving
from training.engine.cadence import Cadence
from training.engine.launch import start_accelerator
from training.engine.saving import MOST_HELD_BYTES, CheckpointWriter, holds_best
from training.engine.training import Training
from training.publishing.exporter import Exporter
from training.run import checkpoint
from training.run.checkpoint import copy_contents, load_tensors
from training.run.folder import RunFolder

DELTA = 0.01
# 18 steps, each with a validation; some of them are the best so far. Every checkpoint that is written is kept.
VALIDATED = (
    "--num_train_epochs", "3", "--validation_steps", "1", "--early_stopping_min_delta", str(DELTA), "--critic", "true",
    "--learning_rate", "2e-2", "--lr_warmup_steps", "0", "--preview_epochs", "0", "--checkpoints_total_limit", "50",
)  # fmt: skip
PERIOD = 5
FLAGS = (*VALIDATED, "--checkpointing_steps", str(PERIOD))
STEPS = range(1, 19)
DUE = (5, 10, 15, 18)


def written(folder: Path) -> list[int]:
    """Return the steps of the checkpoints; with FLAGS, of all that were ever written."""
    return sorted(checkpoint.step_of(path) for path in (folder / "checkpoints").glob("step-*"))


def improvements(folder: Path) -> list[int]:
    """Return the steps whose validation loss was the best so far, according to metrics.csv."""
    best, steps = float("inf"), []
    for step, value in enumerate(column(folder, "val_loss"), start=1):
        if value < best - DELTA:
            best = value
            steps.append(step)
    return steps


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Compare all files of two checkpoints, except for those with the flags, which differ, and measured times."""
    names = [{p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (one, other)]
    assert names[0] == names[1]
    for name in names[0] - {"config.yaml", "manifest.json"}:
        assert contents(one / name) == contents(other / name), name


@pytest.fixture(scope="module")
def at_once(tmp_path_factory) -> Path:
    """A run that writes every checkpoint at once, and one after every step."""
    folder = tmp_path_factory.mktemp("at_once") / "run"
    assert run(folder, *VALIDATED, "--checkpointing_steps", "1") == 0
    return folder


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> Path:
    """A run that holds the best checkpoint in memory."""
    folder = tmp_path_factory.mktemp("held") / "run"
    assert run(folder, *FLAGS) == 0
    return folder


def test_only_what_is_due_is_written_and_the_best_before_it(held):
    best = improvements(held)
    before = {max(step for step in best if step <= due) for due in DUE}
    assert written(held) == sorted({*DUE, *before})
    assert before - set(DUE), "no checkpoint was held until another one was due"
    assert set(best) - before - set(DUE), "every improvement was written, so none was replaced in memory"
    assert os.readlink(held / "checkpoints/best") == f"step-{best[-1]:08d}"


def test_training_and_checkpoints_are_the_same_as_without_holding(held, at_once):
    assert_same_state(held, at_once)
    assert os.readlink(held / "checkpoints/best") == os.readlink(at_once / "checkpoints/best")
    for step in written(held):
        name = f"step-{step:08d}"
        checkpoint.verify(held / "checkpoints" / name)
        assert_same_checkpoint(held / "checkpoints" / name, at_once / "checkpoints" / name)


def test_8_bit_states_are_the_same(tmp_path):
    pytest.importorskip("bitsandbytes")
    for name, period in (("held", "4"), ("at_once", "1")):
        flags = (*VALIDATED, "--optimizer", "adamw_8bit", "--use_ema", "false", "--num_train_epochs", "1")
        assert run(tmp_path / name, *flags, "--checkpointing_steps", period) == 0
    assert set(written(tmp_path / "held")) > {4, 6}
    for step in written(tmp_path / "held"):
        name = f"checkpoints/step-{step:08d}"
        assert_same_checkpoint(tmp_path / "held" / name, tmp_path / "at_once" / name)


@pytest.mark.parametrize("step", [4, 8, 17])
def test_a_stop_writes_the_best_and_the_resumed_run_is_the_same(tmp_path, held, step):
    folder = tmp_path / "run"
    assert run(folder, *FLAGS, "--signal_step", str(step)) == 75
    best = max(one for one in improvements(held) if one < step)  # the events after the last step are pending
    assert state_of(folder)["best_step"] == best
    assert os.readlink(folder / "checkpoints/best") == f"step-{best:08d}"
    assert run(folder, *FLAGS) == 0
    assert_same_state(folder, held)
    assert_same_checkpoint(folder / "checkpoints/best", held / "checkpoints/best")


def test_a_checkpoint_that_is_due_by_time_is_the_one_that_is_held(tmp_path):
    training, config = toy_training()
    folder = RunFolder(tmp_path / "run")
    folder.create()
    accelerator = start_accelerator(config)
    writer = CheckpointWriter(training, folder, Exporter(training.stage, {}, folder, None), accelerator, keep=50)
    state = training.state
    state.step = state.best_step = 3
    writer.hold()
    before = {name: tensor.clone() for name, tensor in flat(training.contents()).items()}
    change(training)
    assert writer.write(must_succeed=False, by_time=True) is True
    assert written(folder.path) == [3]
    assert_equal(tensors_of(folder.checkpoints / "best"), before)
    assert writer.write(must_succeed=False, by_time=True) is False
    assert written(folder.path) == [3, 4]
    state.step = state.best_step = 5
    writer.hold()
    state.step = 6
    assert writer.write(must_succeed=False, by_time=False) is False
    assert written(folder.path) == [3, 4, 5, 6]
    state.step = state.best_step = 7
    writer.hold()
    state.step = state.best_step = 8
    assert writer.write(must_succeed=False, by_time=True) is False
    assert written(folder.path) == [3, 4, 5, 6, 8]
    assert os.readlink(folder.checkpoints / "best") == os.readlink(folder.checkpoints / "latest") == "step-00000008"
    folder.release()


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


@pytest.mark.slow
def test_a_killed_run_finds_the_same_best_again(tmp_path, held):
    """It is killed while a better checkpoint than `best` is only in memory."""
    folder = tmp_path / "run"
    in_memory = next(step for step in improvements(held) if 5 < step < 9)
    # Not a fork: one that is killed while it prints leaves the lock of tqdm taken, which it shares with this process.
    words = ("--output_dir", str(folder), *COMMON, *FLAGS, "--slow_seconds", "0.05")
    metrics = folder / "metrics.csv"
    with subprocess.Popen(
        command(TOY, *words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: process.poll() is not None or lines_of(metrics) > in_memory + 1)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert in_memory not in written(folder)
    assert max(written(folder)) == 5
    assert state_of(folder)["best_step"] == state_of(folder, "best")["step"] < in_memory
    assert run(folder, *FLAGS) == 0
    assert "resumed from step-00000005" in (folder / "run.log").read_text()
    assert written(folder) == written(held)
    assert_same_state(folder, held)
    assert_same_checkpoint(folder / "checkpoints/best", held / "checkpoints/best")


@pytest.mark.parametrize("use_ema", ["true", "false"])
def test_early_stopping_exports_the_best_that_was_held(tmp_path, use_ema):
    folder = tmp_path / "run"
    flags = (*VALIDATED, "--early_stopping_patience", "3", "--early_stopping_min_delta", "100", "--use_ema", use_ema)
    assert run(folder, *flags) == 0
    assert written(folder) == [1, 4]
    name = "unet/diffusion_pytorch_model.safetensors"
    best = load_tensors(folder / "checkpoints/step-00000001/pipeline" / name)
    assert_equal(load_tensors(folder / "pipeline" / name), best)
    assert json.loads((folder / "record.json").read_text())["best"]["step"] == 1


@pytest.mark.parametrize("flags", [("--checkpointing_minutes", "0"), ("--checkpointing_minutes", "0.0",
                                    "--checkpointing_steps", "18")], ids=["none", "last"])  # fmt: skip
def test_a_run_without_other_checkpoints_writes_the_best_at_once(tmp_path, held, flags):
    assert run(tmp_path / "run", *VALIDATED, *flags) == 0
    assert written(tmp_path / "run") == sorted({*improvements(held), 18})


def test_a_large_checkpoint_is_written_at_once(tmp_path, held, monkeypatch):
    training, _ = toy_training()
    monkeypatch.setattr(saving, "MOST_HELD_BYTES", training.checkpoint_bytes() - 1)
    assert run(tmp_path / "run", *FLAGS) == 0
    assert written(tmp_path / "run") == sorted({*improvements(held), *DUE})


def test_only_small_checkpoints_are_held_and_only_if_others_fall_due():
    training, config = toy_training()
    assert training.checkpoint_bytes() < MOST_HELD_BYTES
    for minutes, steps, expected in ((10, None, True), (0, None, False), (0, 5, True), (0, 18, False), (0.1, 18, True)):
        config.checkpointing_minutes, config.checkpointing_steps = minutes, steps
        assert holds_best(training, Cadence(config, 6, 18)) is expected


def test_nothing_newer_is_written_while_the_best_cannot_be(tmp_path, held):
    """Its temporary folder cannot be made. A newer checkpoint would name a best one that does not exist."""
    folder, best = tmp_path / "run", improvements(held)
    blocked = next(step for step in best if step > 2)
    assert blocked <= 4
    assert 5 not in best
    obstacle = folder / f"checkpoints/.writing-step-{blocked:08d}"
    assert run(folder, *FLAGS, "--signal_step", "2") == 75
    obstacle.write_text("")
    with pytest.raises(UserError, match=rf"checkpoint of step {blocked} could not be written .*; free space"):
        run(folder, *VALIDATED, "--checkpointing_steps", "4", "--signal_step", "5")
    log = (folder / "run.log").read_text()
    # When one is due after step 4, and at the stop.
    assert log.count(f"the checkpoint of step {blocked} could not be written") == 2
    assert max(written(folder)) == 2
    obstacle.unlink()
    assert run(folder, *FLAGS) == 0
    assert_same_state(folder, held)
    assert_same_checkpoint(folder / "checkpoints/best", held / "checkpoints/best")


def test_a_run_that_diverges_writes_the_best_that_was_held(tmp_path):
    """With other settings it would not find this step again."""
    flags = ("--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:3,1e23")
    with pytest.raises(UserError, match=r"10 steps in a row .*`latest` \(step-00000003\) and `best` \(step-00000003\)"):
        run(tmp_path / "run", *VALIDATED, *flags)
    assert written(tmp_path / "run") == [3]
    checkpoint.verify(tmp_path / "run/checkpoints/best")


def toy_training(tied: bool = False) -> tuple[Training, ToyConfig]:
    config = ToyConfig(train_batch_size=4, critic=True, report_to="none")
    stage = ToyStage(config)
    if tied:
        critic = stage.phases[1].critic
        critic.register_parameter("tied", critic[0].weight)
    return Training(stage, config, start_accelerator(config)), config


@torch.no_grad()
def change(training: Training) -> None:
    """Change all weights and EMA weights, as later steps do."""
    modules: list[nn.Module] = list(training.stage.phases)
    for parameter in {p for module in modules for p in module.parameters()}:
        parameter.add_(torch.randn_like(parameter))
    assert training.ema is not None
    training.ema.update(1)
    training.state.step += 1


def flat(files: dict) -> dict[str, torch.Tensor]:
    return {
        f"{f}:{name}": t for f, content in files.items() if f.endswith(".safetensors") for name, t in content.items()
    }


def test_writing_an_earlier_state_puts_every_value_back(tmp_path):
    """Also those of tied weights, which are one tensor with two names, and if the files cannot be written."""
    training, _ = toy_training(tied=True)
    change(training)
    for name in ("then", "held", "now", "after"):
        (tmp_path / name).mkdir()
    training.write_files(tmp_path / "then")
    kept = copy_contents(training.contents())
    change(training)
    training.write_files(tmp_path / "now")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        training.write_files(tmp_path / "file" / "inside", kept)
    training.write_files(tmp_path / "held", kept)
    training.write_files(tmp_path / "after")
    assert_same_checkpoint(tmp_path / "held", tmp_path / "then")
    assert_same_checkpoint(tmp_path / "after", tmp_path / "now")
    assert_equal(flat(kept), tensors_of(tmp_path / "then"))
    critic = training.stage.phases[1].critic
    assert critic.tied is critic[0].weight
    different = [
        name for name, tensor in tensors_of(tmp_path / "now").items() if not torch.equal(tensor, flat(kept)[name])
    ]
    assert any("tied" in name for name in different)


@pytest.mark.slow
def test_two_processes_hold_the_same_checkpoints(tmp_path):
    flags = (*COMMON, *VALIDATED, "--train_batch_size", "2")
    toy(tmp_path / "held", *flags, "--checkpointing_steps", "5", processes=2)
    toy(tmp_path / "at_once", *flags, "--checkpointing_steps", "1", processes=2)
    assert_same_state(tmp_path / "held", tmp_path / "at_once")
    assert len(rows(tmp_path / "held")) == len(STEPS)
    assert set(written(tmp_path / "held")) < set(STEPS)
    for step in written(tmp_path / "held"):
        name = f"checkpoints/step-{step:08d}"
        assert_same_checkpoint(tmp_path / "held" / name, tmp_path / "at_once" / name)
