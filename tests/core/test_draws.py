"""Random draws are functions of (seed, step, position, name), whoever draws them, and when."""

from __future__ import annotations

import pytest
import torch

from tests.support.runs import assert_same_state
from tests.support.toy_runs import EVERY_STEP, column, cut_after, run, state_of
from training.core.draws import GROUP, NEWEST, Draws, GroupedDraws, draws_class
from training.core.layout import BatchLayout
from training.engine.step_draws import StepDraws
from training.run.state import RunState

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("kind", [Draws, GroupedDraws])


@BOTH
@pytest.mark.parametrize("positions", [range(4, 8), range(3), range(5, 21), range(16, 24), range(23, 24)], ids=str)
def test_draws_depend_on_the_position_not_on_the_batch(kind, positions):
    whole, part = kind(0, 5, range(24)), kind(0, 5, positions)
    rows = slice(positions.start, positions.stop)
    assert torch.equal(whole.normal("noise", (3, 4))[rows], part.normal("noise", (3, 4)))
    assert torch.equal(whole.uniform("time")[rows], part.uniform("time"))
    assert part.uniform("time").shape == (len(positions),)


@BOTH
def test_draws_differ_by_seed_step_position_and_name(kind):
    rows = [
        kind(seed, step, range(position, position + 1)).normal(name, (64,)).squeeze(0)
        for seed in (0, 1) for step in (0, 1) for position in (0, 1, GROUP) for name in ("a", "b")
    ]  # fmt: skip
    rows += [kind(0, 0, range(1)).variant(name).normal("a", (64,)).squeeze(0) for name in ("x", "y")]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.6


@BOTH
def test_draws_are_standard_normal_and_uniform(kind):
    normal = kind(0, 0, range(5000)).normal("x", (20,))
    uniform = kind(0, 0, range(20_000)).uniform("x")
    assert normal.mean().abs() < 0.02
    assert normal.std() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(normal.T).fill_diagonal_(0).abs().max() < 0.07
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.var() == pytest.approx(1 / 12, abs=0.002)


def test_the_first_version_never_changes():
    """Runs of earlier versions resume with these numbers."""
    assert Draws(3, 7, [2]).normal("noise", (2,)).flatten().tolist() == pytest.approx([-0.156870, -0.653453], abs=1e-6)
    assert Draws(3, 7, [2]).variant("prior 1").uniform("time").tolist() == pytest.approx([0.3393466], abs=1e-7)


@pytest.mark.parametrize("version", [1, NEWEST])
def test_draws_made_ahead_equal_those_made_when_they_are_asked_for(version):
    layout = BatchLayout(3, num_processes=2, gradient_accumulation_steps=2, rank=1)
    state = RunState(draws_version=version)
    ahead, direct = (StepDraws(1, state, layout, CPU, ahead=way) for way in (True, False))
    for step in range(4):
        for micro_batch in range(2):
            one, other = ahead.at(step, micro_batch), direct.at(step, micro_batch)
            assert isinstance(one, draws_class(version))
            shape = (2, step // 2 + 1)  # from step 2 on, another shape than was drawn ahead
            results = []
            for draws in (one, other):
                results.append([draws.normal("noise", shape), draws.uniform("noise")])
                results[-1] += [draws.variant("x").normal("noise", shape)]
                results[-1] += [draws.uniform("late")] if step == 3 else []
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            assert bool(one.made) == (step > 0)
            assert not other.made
            ahead.prepare(step + 1, micro_batch, one.asked)
            direct.prepare(step + 1, micro_batch, other.asked)


def test_the_thread_starts_on_a_device_without_an_index():
    """One process on one GPU has the device `cuda`, which `torch.cuda.set_device` refuses, with or without a GPU."""
    draws = StepDraws(1, RunState(draws_version=NEWEST), BatchLayout(4), torch.device("cuda"), ahead=True)
    with pytest.raises(ValueError, match="index"):
        torch.cuda.set_device(draws.device)
    draws._use_device()


def test_draws_made_for_another_step_are_not_used():
    state, layout = RunState(draws_version=NEWEST), BatchLayout(4)
    ahead = StepDraws(1, state, layout, CPU, ahead=True)
    draws = ahead.at(0, 0)
    draws.uniform("time")
    ahead.prepare(1, 0, draws.asked)
    assert torch.equal(ahead.at(5, 0).uniform("time"), GroupedDraws(1, 5, range(4)).uniform("time"))


def test_a_run_keeps_the_version_of_its_draws(tmp_path, monkeypatch):
    """A run of an earlier version, whose checkpoints record none, resumes with identical bits."""
    assert (
        RunState.from_json({"means": {}, "epoch_loss": RunState().epoch_loss.state(), "epochs": []}).draws_version == 1
    )
    run(tmp_path / "new")
    with monkeypatch.context() as earlier:
        earlier.setattr("training.engine.training.NEWEST", 1)
        run(tmp_path / "whole", *EVERY_STEP)
        run(tmp_path / "parts", *EVERY_STEP)
    cut_after(tmp_path / "parts", 3)
    run(tmp_path / "parts", *EVERY_STEP)
    assert_same_state(tmp_path / "parts", tmp_path / "whole")
    assert (state_of(tmp_path / "parts")["draws_version"], state_of(tmp_path / "new")["draws_version"]) == (1, NEWEST)
    assert column(tmp_path / "new", "loss") != column(tmp_path / "whole", "loss")
