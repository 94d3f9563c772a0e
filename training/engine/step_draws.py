"""The random draws of the training steps. On a GPU, those of the next step are drawn while it computes this one."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from training.core.draws import Draws, Request, draws_class
from training.core.layout import BatchLayout
from training.run.state import RunState


class StepDraws:
    """Makes the draws of each micro-batch of one phase on this process.

    A thread can draw the numbers of the next step, because a phase asks for the same names and shapes in every step. A
    number that nobody has drawn ahead is drawn when it is asked for; it is the same number.

    Args:
        state: the counters of the run; its checkpoint may record an earlier version of the draws.
        compiled: whether the phase is compiled.
        ahead: whether to draw ahead. With None, that is done beside a GPU; on a CPU, the thread would take its time
            from the step.
    """

    def __init__(
        self,
        seed: int,
        state: RunState,
        layout: BatchLayout,
        device: torch.device,
        *,
        compiled: bool = False,
        ahead: bool | None = None,
    ):
        self.seed, self.state, self.layout, self.device, self.compiled = seed, state, layout, device, compiled
        self._pinned = device.type == "cuda"
        self._made: dict[int, tuple[int, Future[dict[Request, Tensor]]]] = {}  # by micro-batch: a step, and its numbers
        self._worker = None
        if device.type != "cpu" if ahead is None else ahead:
            self._worker = ThreadPoolExecutor(1, "draws", initializer=self._use_device)

    def at(self, step: int, micro_batch: int) -> Draws:
        """Return the draws of a micro-batch of this process."""
        draws = self._new(step, micro_batch)
        for_step, made = self._made.pop(micro_batch, (None, None))
        if made is not None and for_step == step:
            draws.made = made.result()
        return draws

    def prepare(self, step: int, micro_batch: int, requests: Iterable[Request]) -> None:
        """Begin to draw the numbers of a later micro-batch in the thread, where there is one."""
        if self._worker is not None:
            later, wanted = self._new(step, micro_batch), list(requests)
            self._made[micro_batch] = step, self._worker.submit(self._all_of, later, wanted)

    def divide(self, layout: BatchLayout) -> None:
        """Use another split of the global batch; what was drawn ahead for the old one is dropped."""
        self.layout = layout
        self._made = {}

    def _new(self, step: int, micro_batch: int) -> Draws:
        version = self.state.draws_version
        kind = outside_graphs(version) if self.compiled else draws_class(version)
        return kind(self.seed, step, self.layout.positions(micro_batch), self.device)

    def _all_of(self, draws: Draws, requests: Iterable[Request]) -> dict[Request, Tensor]:
        made = {request: draws.on_cpu(request) for request in requests}
        # From pinned memory, a GPU copies the numbers without making the process wait.
        return {request: numbers.pin_memory() for request, numbers in made.items()} if self._pinned else made

    def _use_device(self) -> None:
        # A thread starts with the first GPU, and pinning memory there would take memory of another process's GPU. A
        # device without an index is the only one that this process uses, and `set_device` refuses it.
        if self._pinned and self.device.index is not None:
            torch.cuda.set_device(self.device)


@functools.cache
def outside_graphs(version: int) -> type[Draws]:
    """Return the draws of a version for compiled phases, as torch.compile cannot trace seeded CPU generators.

    The class is made on demand because importing the front end of torch.compile takes three seconds.
    """
    kind = draws_class(version)
    untraced = {name: torch.compiler.disable(getattr(kind, name)) for name in ("normal", "uniform")}
    return type(f"{kind.__name__}OutsideGraphs", (kind,), untraced)
