"""Learning rates are functions of the step."""

from __future__ import annotations

import pytest
import torch

from training.engine.schedule import LR_SCHEDULERS, ScheduleConfig, learning_rate_factor


@pytest.mark.parametrize("name", [n for n in LR_SCHEDULERS if n != "piecewise_constant"])
def test_schedules_are_those_of_diffusers_counted_in_steps(name):
    from diffusers.optimization import get_scheduler

    config = ScheduleConfig(lr_scheduler=name, lr_warmup_steps=5, lr_num_cycles=2)
    factor = learning_rate_factor(config, 40)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, reference, num_warmup_steps=5, num_training_steps=40, num_cycles=2)
    for step in range(40):
        assert factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        reference.step()
        scheduler.step()


def test_piecewise_constant():
    factor = learning_rate_factor(
        ScheduleConfig(lr_scheduler="piecewise_constant", lr_step_rules="1:10,0.1:20,0.01"), 30
    )
    assert [factor(step) for step in (0, 9, 10, 19, 20, 29)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
