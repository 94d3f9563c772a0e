"""The noise levels of a student, and the way of the teacher between them, compared with closed forms in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from training.objectives.few_steps import advance, euler, few_step_scheduler, noise_levels

X = torch.tensor([[1.0, -2.0]], dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 1.2, 3.0])
@pytest.mark.parametrize("num_steps", range(1, 9))
def test_the_levels_lead_from_noise_to_clean_samples_and_the_last_step_has_its_share(num_steps, shift):
    scheduler = few_step_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), num_steps)
    levels = noise_levels(scheduler, num_steps)
    assert len(levels) == num_steps + 1
    assert (levels[0], levels[-1]) == (1.0, 0.0)
    assert all(before > after for before, after in pairwise(levels))
    assert levels[-2] == pytest.approx(1 / num_steps, rel=1e-5)
    if shift == 1:
        lengths = [before - after for before, after in pairwise(levels)]
        assert lengths == pytest.approx([1 / num_steps] * num_steps, rel=1e-5)


def test_the_levels_of_a_teacher_would_waste_the_last_step():
    """What `few_step_scheduler` corrects; once Diffusers ends elsewhere, it is no longer needed."""
    assert noise_levels(FlowMatchEulerDiscreteScheduler(), 4)[-2] < 0.01


def test_euler_is_the_scheduler_of_diffusers():
    scheduler = few_step_scheduler(FlowMatchEulerDiscreteScheduler(shift=1.2), 4)
    levels = noise_levels(scheduler, 4)
    x = X.float()
    for timestep in scheduler.timesteps:
        x = scheduler.step(x * timestep / 1000, timestep, x).prev_sample
    states = euler(X.float(), lambda state, level: state * level, levels)
    assert len(states) == 5
    assert torch.allclose(states[-1], x, rtol=1e-5)


def test_a_straight_flow_needs_one_step():
    x, slope = advance(X, lambda state, level: torch.full_like(state, 3.0), 1.0, 0.25, 1)
    assert torch.allclose(x, X - 0.75 * 3)
    assert slope.length == -0.75


def test_the_error_falls_with_the_square_of_the_number_of_steps():
    """dx / dlevel = x has the solution x exp(level - 1)."""
    exact = X * math.exp(-1)
    errors = []
    for substeps in (8, 16, 32):
        x, previous = X, None
        for start, end in pairwise([1.0, 0.6, 0.3, 0.0]):  # steps of several lengths
            x, previous = advance(x, lambda state, level: state, start, end, substeps, previous)
        errors.append(float((x - exact).abs().max()))
    assert [before / after for before, after in pairwise(errors)] == pytest.approx([4, 4], rel=0.2)


def test_the_step_before_is_used():
    flow = lambda state, level: state  # noqa: E731
    half, previous = advance(X, flow, 1.0, 0.5, 4)
    whole, _ = advance(X, flow, 1.0, 0.0, 8)
    assert torch.allclose(advance(half, flow, 0.5, 0.0, 4, previous)[0], whole)
    assert not torch.allclose(advance(half, flow, 0.5, 0.0, 4)[0], whole)
