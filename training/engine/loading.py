"""The micro-batches of a run, in the sampler's order."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from training.core.batches import collate_function, fetch, to_device
from training.core.draws import Draws
from training.core.layout import BatchLayout
from training.core.stage import Batch, MapDataset
from training.engine.sampler import StepSampler, Strata
from training.engine.signals import leave_signals_to_the_trainer
from training.engine.threads import usable_cores


class MicroBatches:
    """The samples of each step that this process trains on.

    Args:
        strata: classes and their shares for weighted draws; with None each row is drawn once per epoch.
        num_workers: number of loader processes; 0 loads in this process.
    """

    def __init__(
        self,
        data: MapDataset,
        layout: BatchLayout,
        *,
        seed: int,
        strata: Strata | None,
        num_workers: int,
        device: torch.device,
    ):
        self.data, self.layout, self.seed, self.strata = data, layout, seed, strata
        self.num_workers, self.device = num_workers, device
        self._cores = usable_cores()  # before the main thread is kept on one of them

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step in `start <= step < stop`, on the device."""
        loader = DataLoader(
            self.data,  # type: ignore[arg-type]
            batch_sampler=self._sampler(start, stop),  # type: ignore[arg-type]
            collate_fn=collate_function(self.data),
            num_workers=self.num_workers,
            worker_init_fn=functools.partial(start_worker, cores=self._cores) if self.num_workers else None,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        for _ in range(start, stop):
            yield [to_device(next(batches), self.device) for _ in range(self.layout.gradient_accumulation_steps)]

    def first(self) -> tuple[Batch, Draws]:
        """Return the first micro-batch of the run and its random draws."""
        batch = fetch(self.data, self._sampler(0, 1).keys(0, 0))
        return to_device(batch, self.device), Draws(self.seed, 0, self.layout.positions(0), self.device)

    def rows(self, step: int, micro_batches: list[int]) -> list[int]:
        """Return the indices of the dataset rows in the given micro-batches of a step."""
        sampler = self._sampler(0, 1)
        return [key.index for micro_batch in micro_batches for key in sampler.keys(step, micro_batch)]

    def _sampler(self, start: int, stop: int) -> StepSampler:
        return StepSampler(len(self.data), self.layout, self.seed, start, stop, self.strata)


def start_worker(worker_id: int, cores: Sequence[int]) -> None:
    """Prepare a data-loading process: signals are for the trainer alone, and it may use all `cores`."""
    leave_signals_to_the_trainer(worker_id)
    if cores:
        os.sched_setaffinity(0, cores)
