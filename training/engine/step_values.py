"""The values of the last steps, which stay on the device until they are needed.

A process that reads a value waits until a GPU has computed it, and the GPU then waits for its next work. Therefore the
loop reads the values of several steps at once: before the events that need them, and after a second at the latest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_STEPS = 10
MOST_SECONDS = 1.0
"""Values are read after this time, because a request to stop, from any of several processes, is known only then."""


@dataclass(frozen=True)
class Requests:
    """What a process tells the others in a step, or what they all have agreed on."""

    stop: bool = False
    """To stop after this step."""
    save: bool = False
    """To save a checkpoint after this step."""
    seconds: float = 0.0
    """Seconds of a step, the mean over the processes; 0 if they are not known yet."""


@dataclass
class StepValues:
    """Values of one phase's step; the same on every process, except for `bad_micro_batches`."""

    values: dict[str, float]
    finite: bool
    bad_micro_batches: list[int]
    """Micro-batches of this process whose loss is not finite; all of them if only the gradient is not finite."""
    requests: Requests
    """What any process asks for."""


@dataclass
class StepOutcome:
    """Result of one phase's step, on the device. `read` gives its values.

    Attributes:
        names: names of the metrics, in the order of `row`.
        row: float32, their means over the processes; with several processes, the means of `requests` follow.
        finite_losses: bool, for each micro-batch of this process.
        taken: whether the optimizer step was taken; a tensor if this process does not know it yet.
        requests: what this process asks for.
        known: further values, which this process knows.
    """

    names: list[str]
    row: Tensor
    finite_losses: Tensor
    taken: Tensor | bool
    requests: Requests
    known: dict[str, float] = field(default_factory=dict)

    def packed(self) -> list[Tensor]:
        """Return everything that has to be read, as vectors of float32."""
        flag = [self.taken.float().reshape(1)] if isinstance(self.taken, Tensor) else []
        return [self.row, self.finite_losses.float(), *flag]

    def unpacked(self, numbers: Sequence[float]) -> StepValues:
        """Return the values from the numbers in `packed`."""
        row, rest = numbers[: len(self.row)], numbers[len(self.row) :]
        micro_batches = range(len(self.finite_losses))
        finite = bool(rest[-1]) if isinstance(self.taken, Tensor) else self.taken
        bad = [m for m in micro_batches if not rest[m]] if not finite else []
        agreed = self.requests
        if len(row) > len(self.names):
            stop, save, seconds = row[len(self.names) :]
            agreed = Requests(stop > 0, save > 0, seconds)
        values = dict(zip(self.names, row, strict=False)) | self.known
        return StepValues(values, finite, bad or list(micro_batches), agreed)


def read(outcomes: Sequence[StepOutcome]) -> list[StepValues]:
    """Return the values of outcomes with a single exchange with the device."""
    packed = [outcome.packed() for outcome in outcomes]
    numbers = torch.cat([vector for vectors in packed for vector in vectors]).tolist() if packed else []
    results, start = [], 0
    for outcome, vectors in zip(outcomes, packed, strict=True):
        stop = start + sum(map(len, vectors))
        results.append(outcome.unpacked(numbers[start:stop]))
        start = stop
    return results


@dataclass
class DoneStep:
    """A step that was taken: its number (from 0), its learning rate, and the outcome of each phase, by its place."""

    step: int
    learning_rate: float
    outcomes: dict[int, StepOutcome]


class Waiting:
    """The steps whose values have not been read yet."""

    def __init__(self) -> None:
        self._steps: list[DoneStep] = []
        self._most = 1  # until the time of a step is known
        self.seconds = 0.0
        """Seconds of a step of this process, by the steps that were read last; 0 if they are not known yet."""
        self.restart_clock()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        """Whether the values should be read now: the same on every process."""
        return len(self._steps) >= self._most

    def add(self, step: DoneStep) -> None:
        self._steps.append(step)

    def restart_clock(self) -> None:
        """Count the time of the next steps from now on."""
        self._since = time.perf_counter()

    def read(self) -> list[tuple[DoneStep, dict[int, StepValues]]]:
        """Return the waiting steps in their order, with the values of each phase."""
        results = iter(read([outcome for step in self._steps for outcome in step.outcomes.values()]))
        done = [(step, {place: next(results) for place in step.outcomes}) for step in self._steps]
        if done:
            self.seconds = (time.perf_counter() - self._since) / len(done)
            self._most = steps_in_a_second([values.requests for _, phases in done for values in phases.values()])
        self._steps = []
        self.restart_clock()
        return done


def steps_in_a_second(agreed: Sequence[Requests]) -> int:
    """Return after how many steps values are read next, from what the processes agreed on in the last steps."""
    seconds = agreed[-1].seconds if agreed else 0.0
    return max(1, min(MOST_STEPS, int(MOST_SECONDS / seconds))) if seconds > 0 else 1
