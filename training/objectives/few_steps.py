"""Distillation of a flow to a few steps: the student's noise levels, and the teacher's way from one to the next.

A student takes N Euler steps. Within each of them, the teacher takes several smaller ones, and the student learns the
straight line between both ends (progressive distillation, Salimans and Ho 2022, in a single round and for rectified
flow), with the teacher's guidance (Meng et al. 2022). A student's prediction is a flow like that of its teacher, so
that the Euler scheduler of Diffusers samples both.

B batch, C channels, h w cells. Flow: x_t = (1 - level) x_0 + level noise, and the flow is noise - x_0 = dx / dlevel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Flow = Callable[[Tensor, float], Tensor]
"""(x B C h w, noise level) → the flow there, B C h w."""


class Slope(NamedTuple):
    """The flow of a step and the length of the step, a difference of noise levels."""

    flow: Tensor
    length: float


def few_step_scheduler(scheduler: Any, num_steps: int) -> Any:
    """Return the Euler scheduler of Diffusers for a student with this number of steps.

    The levels of `scheduler` end beside 0, so that the last of a few steps would be spent on almost clean samples. With
    `shift_terminal`, the last step begins at the level 1 / N instead.

    Args:
        scheduler: FlowMatchEulerDiscreteScheduler of the teacher.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    terminal = 1 / num_steps if num_steps > 1 else None
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift_terminal=terminal)


def noise_levels(scheduler: Any, num_steps: int) -> list[float]:
    """Return the noise levels between which a scheduler's Euler steps lead: N + 1 of them, from 1 to 0."""
    scheduler.set_timesteps(num_steps)
    return [float(level) for level in scheduler.sigmas]


def advance(
    x: Tensor, flow: Flow, start: float, end: float, substeps: int, previous: Slope | None = None
) -> tuple[Tensor, Slope]:
    """Follow a flow from one noise level to another in equal steps of the Adams-Bashforth method of second order.

    It needs one evaluation for each step, as Euler's method does, and reuses that of the step before.

    Args:
        x: B C h w at the level `start`.
        previous: the last step before `start`; None begins with a step of Euler's method.

    Returns:
        x at the level `end`, and the last step.
    """
    length = (end - start) / substeps
    for substep in range(substeps):
        slope = flow(x, start + substep * length)
        direction = slope
        if previous is not None:
            direction = slope + (slope - previous.flow) * (length / (2 * previous.length))
        x, previous = x + length * direction, Slope(slope, length)
    return x, previous or Slope(x, length)


def euler(x: Tensor, flow: Flow, levels: Sequence[float]) -> list[Tensor]:
    """Return x at each of `levels`, from the first to the last, by one Euler step between two of them."""
    states = [x]
    for start, end in zip(levels, levels[1:], strict=False):
        states.append(states[-1] + (end - start) * flow(states[-1], start))
    return states
