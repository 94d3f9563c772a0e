"""The step at which a phase begins, and its learning rate at each step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipelines.tools.cli import UserError
from training.core.options import Options, option
from training.core.stage import Phase

LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "piecewise_constant",
)


WITHOUT_WARMUP = ("constant", "piecewise_constant")
USUAL_WARMUP_STEPS = 100
# The largest share of the steps of a phase that its warm-up may take.
MOST_WARMUP = 0.05


@dataclass
class ScheduleConfig(Options):
    """Options for the learning-rate schedule."""

    lr_scheduler: str = option("constant_with_warmup", on_resume="warn", choices=LR_SCHEDULERS)
    """Learning-rate schedule: linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup or
    piecewise_constant"""
    lr_warmup_steps: int | None = option(None, on_resume="warn", at_least=0, kept=True)
    """Number of optimizer steps over which the learning rate rises from 0 to its peak, at most 5 % of the steps of the
    run (of the phase, if it begins later); 100 if unset. Not used with constant and piecewise_constant"""
    lr_num_cycles: int = option(1, on_resume="warn")
    """Number of cycles of the cosine_with_restarts schedule"""
    lr_power: float = option(1.0, on_resume="warn")
    """Power of the polynomial schedule"""
    lr_step_rules: str | None = option(None, on_resume="warn")
    """Factors of the piecewise_constant schedule, e.g. '1:100,0.1:200,0.01': 1 until step 100, 0.1 until step 200,
    then 0.01"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            raise UserError("--lr_scheduler piecewise_constant needs --lr_step_rules, e.g. '1:100,0.1:200,0.01'")
        if self.lr_step_rules and not re.fullmatch(r"([\d.eE+-]+:\d+,)*[\d.eE+-]+", self.lr_step_rules):
            raise UserError(
                f"--lr_step_rules is {self.lr_step_rules!r}; it must have the form factor:step,…,factor, "
                "e.g. '1:100,0.1:200,0.01'"
            )

    @property
    def has_warmup(self) -> bool:
        return self.lr_scheduler not in WITHOUT_WARMUP

    def warmup_steps(self, total_steps: int, most: float) -> int:
        """Return the number of warm-up steps of a phase of `total_steps`, of which they take at most the share `most`.

        With the share 1 they are not limited, as in earlier versions: the warm-up may then be longer than the phase.
        """
        if not self.has_warmup:
            return 0
        wished = USUAL_WARMUP_STEPS if self.lr_warmup_steps is None else self.lr_warmup_steps
        return wished if most >= 1 else min(wished, int(most * total_steps))


class PhaseSchedule:
    """The first step of one phase in a run of `total_steps`, and its learning rate at each step.

    The learning-rate schedule begins with the phase and ends with the run.

    Args:
        learning_rate: peak learning rate.
        most_warmup: see `RunState.most_warmup`.
    """

    def __init__(
        self, phase: Phase, config: ScheduleConfig, learning_rate: float, total_steps: int, most_warmup: float
    ):
        self.name, self.first_step = phase.name, phase.first_step(total_steps)
        self.steps = max(1, total_steps - self.first_step)
        self.warmup_steps = config.warmup_steps(self.steps, most_warmup)
        self._learning_rate = learning_rate
        self._factor = learning_rate_factor(config, self.steps, self.warmup_steps)

    def has_begun(self, step: int) -> bool:
        """Return whether the phase is trained in `step` (from 0)."""
        return step >= self.first_step

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate at `step` (from 0) of the run."""
        return self._learning_rate * self._factor(max(0, step - self.first_step))


def learning_rate_factor(config: ScheduleConfig, total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Return a schedule of `diffusers.optimization.get_scheduler` as a function: step (from 0) → learning-rate factor.

    A function of the step has no state to save, and does not depend on the number of processes or on gradient
    accumulation.
    """
    from diffusers.optimization import get_scheduler

    placeholder = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=placeholder,
            step_rules=config.lr_step_rules,
            num_warmup_steps=warmup_steps,
            num_training_steps=total_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    return scheduler.lr_lambdas[0]
