"""Learning rates are functions of the step."""

from __future__ import annotations

import pytest
import torch

from training.engine.schedule import LR_SCHEDULERS, MOST_WARMUP, ScheduleConfig, learning_rate_factor
from training.run.state import RunState


@pytest.mark.parametrize("name", [n for n in LR_SCHEDULERS if n != "piecewise_constant"])
def test_schedules_are_those_of_diffusers_counted_in_steps(name):
    from diffusers.optimization import get_scheduler

    config = ScheduleConfig(lr_scheduler=name, lr_warmup_steps=5, lr_num_cycles=2)
    factor = learning_rate_factor(config, 40, config.lr_warmup_steps)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, reference, num_warmup_steps=5, num_training_steps=40, num_cycles=2)
    for step in range(40):
        assert factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        reference.step()
        scheduler.step()


def test_piecewise_constant():
    factor = learning_rate_factor(
        ScheduleConfig(lr_scheduler="piecewise_constant", lr_step_rules="1:10,0.1:20,0.01"), 30, 0
    )
    assert [factor(step) for step in (0, 9, 10, 19, 20, 29)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


@pytest.mark.parametrize(
    ("wished", "steps", "expected"),
    [(None, 10_000, 100), (None, 1200, 60), (None, 12, 0), (500, 6000, 300), (20, 6000, 20), (0, 6000, 0)],
)
def test_the_warmup_takes_at_most_a_twentieth(wished, steps, expected):
    assert ScheduleConfig(lr_warmup_steps=wished).warmup_steps(steps, MOST_WARMUP) == expected


def test_the_warmup_of_a_run_of_an_earlier_version_is_not_limited():
    assert ScheduleConfig(lr_warmup_steps=100).warmup_steps(12, RunState().most_warmup) == 100


def test_schedules_without_a_warmup():
    config = ScheduleConfig(lr_scheduler="constant", lr_warmup_steps=100)
    assert (config.has_warmup, config.warmup_steps(10_000, MOST_WARMUP)) == (False, 0)
