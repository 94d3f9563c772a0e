"""The random numbers of a run: each is a function of (seed, step, position in the global batch, name).

Nothing here has a state to save. A run that is resumed, or distributed over another number of processes, draws the same
numbers.

B batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

GROUP = 8
"""Number of consecutive positions whose numbers come from one generator in `GroupedDraws`."""


class SampleKey(NamedTuple):
    """One position of a batch: the index of the dataset row, and a seed for the random transforms of this sample."""

    index: int  # type: ignore[assignment]  # it replaces the method tuple.index
    key: int


class Request(NamedTuple):
    """What a phase asks of its draws: numbers of one distribution, shape and name, of the variant that it names."""

    kind: Literal["normal", "uniform"]
    variant: str
    name: str
    shape: tuple[int, ...]


FILLS: dict[str, Callable[..., Tensor]] = {"normal": torch.Tensor.normal_, "uniform": torch.Tensor.uniform_}


def mix(*parts: int | str) -> int:
    """Return a 63-bit seed derived from integers and strings; it is the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class Draws:
    """The random numbers of one micro-batch: row i is a function of (seed, step, positions[i], name) alone.

    They are drawn on the CPU for any device, so that a run that moves to other hardware gets the same noise. Each row
    has a generator of its own, so that the positions may be any numbers, such as the rows of a data set.
    """

    def __init__(self, seed: int, step: int | str, positions: Sequence[int], device: torch.device | str = "cpu"):
        self.seed = seed
        self.step = step
        self.positions = positions
        self.device = device
        self.made: Mapping[Request, Tensor] = {}
        """Numbers that were drawn ahead, on the CPU; they equal those that `on_cpu` returns."""
        self.asked: dict[Request, None] = {}
        """What has been asked for so far, in this order and without repetitions."""
        self._variant = ""

    def __len__(self) -> int:
        return len(self.positions)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers, B × shape, float32. Different names give independent numbers."""
        return self._on_device(Request("normal", self._variant, name, tuple(shape)))

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Return numbers uniform in [0, 1), B × shape, float32. Different names give independent numbers."""
        return self._on_device(Request("uniform", self._variant, name, tuple(shape)))

    def variant(self, name: str) -> Self:
        """Return draws for the same positions that are independent of these."""
        other = type(self)(self.seed, self.step, self.positions, self.device)
        other.made, other.asked, other._variant = self.made, self.asked, f"{self._variant}, {name}"
        return other

    def on_cpu(self, request: Request) -> Tensor:
        """Return the numbers that a request describes, B × shape."""
        rows, generator = torch.empty(len(self.positions), *request.shape), torch.Generator()
        for row, position in zip(rows, self.positions, strict=True):
            generator.manual_seed(mix(self.seed, "draw", self._moment(request), position, request.name))
            FILLS[request.kind](row, generator=generator)
        return rows

    def _moment(self, request: Request) -> int | str:
        return f"{self.step}{request.variant}" if request.variant else self.step

    def _on_device(self, request: Request) -> Tensor:
        self.asked[request] = None
        numbers = self.made.get(request)
        return (self.on_cpu(request) if numbers is None else numbers).to(self.device, non_blocking=True)


class GroupedDraws(Draws):
    """The same for consecutive positions, several times faster: one generator draws for `GROUP` positions at once.

    Position p is row p % GROUP of the group p // GROUP, which is always drawn as a whole; so its numbers do not depend
    on where a micro-batch begins or ends.

    Args:
        positions: a range with a step of 1.
    """

    positions: range

    def on_cpu(self, request: Request) -> Tensor:
        start, stop = self.positions.start, self.positions.stop
        first = start // GROUP
        groups = torch.empty(-(-stop // GROUP) - first, GROUP, *request.shape)
        generator, fill = torch.Generator(), FILLS[request.kind]
        for number, group in enumerate(groups.unbind(), first):
            generator.manual_seed(mix(self.seed, "draws of a group", self._moment(request), number, request.name))
            fill(group, generator=generator)
        return groups.flatten(0, 1)[start - first * GROUP : stop - first * GROUP]


NEWEST = 2
"""Version of the draws of a new run. A run keeps the version that it began with, so that it resumes exactly."""


def draws_class(version: int) -> type[Draws]:
    """Return the draws of the training steps of a run whose checkpoints record this version."""
    return Draws if version == 1 else GroupedDraws
