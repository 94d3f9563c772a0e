"""The micro-batches of a run, in the sampler's order."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader

from training.core.batches import collate_function, fetch, to_device
from training.core.draws import Draws
from training.core.layout import BatchLayout
from training.core.stage import Batch, MapDataset
from training.engine.sampler import StepSampler, Strata
from training.engine.signals import leave_signals_to_the_trainer
from training.engine.threads import usable_cores

logger = logging.getLogger("halftone")

SHARED_MEMORY = Path("/dev/shm")
MOST_WORKERS = 4
# Two are prefetched, one is being made, and one is on its way.
BATCHES_PER_WORKER = 4
OTHER_SHARED_BYTES = 2**20  # locks, and what each allocation adds


class MicroBatches:
    """The samples of each step that this process trains on.

    Args:
        strata: classes and their shares for weighted draws; with None each row is drawn once per epoch.
        num_workers: number of loader processes; 0 loads in this process, and "auto" is `automatic_workers`.
    """

    def __init__(
        self,
        data: MapDataset,
        layout: BatchLayout,
        *,
        seed: int,
        strata: Strata | None,
        num_workers: int | Literal["auto"],
        device: torch.device,
    ):
        self.data, self.layout, self.seed, self.strata = data, layout, seed, strata
        self.device = device
        self._cores = usable_cores()  # before the main thread is kept on one of them
        self.num_workers = chosen_workers(num_workers, data, device)

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step in `start <= step < stop`, on the device."""
        num_workers = usable_workers(self.num_workers, lambda: _bytes_of(self.first()[0]))
        loader = DataLoader(
            self.data,  # type: ignore[arg-type]
            batch_sampler=self._sampler(start, stop),  # type: ignore[arg-type]
            collate_fn=collate_function(self.data),
            num_workers=num_workers,
            worker_init_fn=functools.partial(start_worker, cores=self._cores) if num_workers else None,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        for _ in range(start, stop):
            yield [to_device(next(batches), self.device) for _ in range(self.layout.gradient_accumulation_steps)]

    def first(self) -> tuple[Batch, Draws]:
        """Return the first micro-batch of the run and its random draws."""
        batch = fetch(self.data, self._sampler(0, 1).keys(0, 0))
        return to_device(batch, self.device), Draws(self.seed, 0, self.layout.positions(0), self.device)

    def first_sample(self) -> tuple[Batch, Draws]:
        """Return a micro-batch of the first sample of the run alone, and its random draws."""
        batch = fetch(self.data, self._sampler(0, 1).keys(0, 0)[:1])
        return to_device(batch, self.device), Draws(self.seed, 0, self.layout.positions(0)[:1], self.device)

    def rows(self, step: int, micro_batches: list[int]) -> list[int]:
        """Return the indices of the dataset rows in the given micro-batches of a step."""
        sampler = self._sampler(0, 1)
        return [key.index for micro_batch in micro_batches for key in sampler.keys(step, micro_batch)]

    def _sampler(self, start: int, stop: int) -> StepSampler:
        groups = getattr(self.data, "batch_groups", None)
        blocks = getattr(self.data, "row_blocks", None)
        return StepSampler(len(self.data), self.layout, self.seed, start, stop, self.strata, groups, blocks)


def chosen_workers(chosen: int | Literal["auto"], data: MapDataset, device: torch.device) -> int:
    """Return the number of loader processes that `--dataloader_num_workers` means in this process."""
    return automatic_workers(data, device, len(usable_cores())) if chosen == "auto" else chosen


def automatic_workers(data: MapDataset, device: torch.device, cores: int) -> int:
    """Return the number of loader processes that `--dataloader_num_workers auto` means.

    Beside training on a CPU they gain nothing, since PyTorch's threads use all cores (docs/LOG.md). Where processes are
    not forked, they take seconds to start, and a script without `if __name__ == "__main__"` could not start them.

    Args:
        cores: number of cores that the processes of this machine share.
    """
    started_by = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if device.type != "cuda" or started_by != "fork" or not getattr(data, "decodes_images", False):
        return 0
    spare = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1
    return max(0, min(MOST_WORKERS, spare))


def start_worker(worker_id: int, cores: Sequence[int]) -> None:
    """Prepare a data-loading process: signals are for the trainer alone, and it may use all `cores`."""
    leave_signals_to_the_trainer(worker_id)
    if cores:
        os.sched_setaffinity(0, cores)


def usable_workers(wanted: int, batch_bytes: Callable[[], int]) -> int:
    """Return the number of loader processes: `wanted`, or 0 if the shared memory is too small for their batches.

    They pass batches on in shared memory. Where it is full, they die or wait for ever; it often has 64 MiB in a
    container, and is missing in some sandboxes. The batches are the same for any number of processes.
    """
    if not wanted or sys.platform != "linux":
        return wanted
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    needed = OTHER_SHARED_BYTES + wanted * BATCHES_PER_WORKER * batch_bytes()
    if free >= needed:
        return wanted
    logger.warning(
        "--dataloader_num_workers %d needs about %.0f MiB of shared memory, and %s has %.0f MiB: loading in this "
        "process instead. Make it larger (Docker: --shm-size=1g) to use the workers",
        wanted,
        needed / 2**20,
        SHARED_MEMORY,
        free / 2**20,
    )
    return 0


def _bytes_of(batch: Batch) -> int:
    return sum(v.numel() * v.element_size() for v in batch.values() if isinstance(v, torch.Tensor))
