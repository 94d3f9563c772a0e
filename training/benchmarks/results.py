"""One measured value with its spread and its goal: the rows of docs/benchmarks.md."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LOOP_RATIO = "speed over the bare loop, by turns in one process"
LOOP_SPEED = "loop with everything on"
HOST_TIME = "CPU time of a step beside the network"
STEP_MEMORY = "training steps of {}: peak memory"
SAMPLING_TIME = "euler, 25 steps: an image"
FIRST_STEP = "accelerate launch to the first step's end"
FOLDER_SPEED = "folder of JPEGs, 0 workers"
LATENTS_TIME = "latent cache: 1,024 latents with flips and all draws of a step"


@dataclass(frozen=True)
class Metric:
    """One measured value, and the goal that it should meet.

    Attributes:
        low, high: the quartiles of the measurements, whose median is `value`; None for a single measurement.
    """

    name: str
    value: float
    unit: str = ""
    goal: float | None = None
    at_most: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    @property
    def verdict(self) -> str:
        return {None: "", True: "met", False: "MISSED"}[self.met]

    @property
    def goal_text(self) -> str:
        return "" if self.goal is None else f"{'≤' if self.at_most else '≥'} {self.goal:g}"

    def line(self) -> str:
        """Return one line for the terminal: name, value, spread, goal, and whether the goal is met."""
        spread = "" if self.low is None or self.high is None else f"{short(self.low)} to {short(self.high)}"
        return (
            f"{self.name:<66} {short(self.value):>9} {self.unit:<10} {spread:>18} {self.goal_text:>8}  {self.verdict}"
        ).rstrip()


def spread(
    name: str, values: Sequence[float], unit: str = "", goal: float | None = None, at_most: bool = False
) -> Metric:
    """Return the median of several measurements with their quartiles."""
    low, high = quartiles(values)
    return Metric(name, statistics.median(values), unit, goal, at_most, low, high)


def quartiles(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return the first and the third quartile, between the smallest and the largest value; None for one value."""
    if len(values) < 2:
        return None, None
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return cuts[0], cuts[2]


def ratio(
    name: str,
    above: Sequence[float],
    below: Sequence[float],
    unit: str = "",
    goal: float | None = None,
    at_most: bool = False,
) -> Metric:
    """Return the median of the ratios of pairs, each of which was measured in one turn."""
    return spread(name, [a / b for a, b in zip(above, below, strict=True)], unit, goal, at_most)


def in_turns(sides: Mapping[str, Callable[[], object]], turns: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each turn of each side; the sides alternate, so that a busy machine disturbs all of them.

    Args:
        warm_up: number of turns of each side before the measured ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + turns):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def short(value: float) -> str:
    """Return a number with three significant digits, and all digits before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.{2 if abs(value) < 10 else 1}f}"
