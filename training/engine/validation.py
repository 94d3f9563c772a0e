"""Evaluating a stage's models: with EMA weights, in eval mode, and with the batches divided among the processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from training.core.batches import fetch, to_device, uniform_batches
from training.core.draws import Draws, SampleKey, mix
from training.core.stage import Stage
from training.engine.ema import EMA
from training.engine.launch import gather
from training.engine.signals import Interrupted

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def evaluating(modules: Iterable[nn.Module], ema: EMA | None) -> Iterator[None]:
    """Give the modules their EMA weights, eval mode and no gradients inside the block; restore everything after it."""
    parts = [part for module in modules for part in module.modules()]
    were_training = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        if ema is None:
            with torch.no_grad():
                yield
        else:
            with torch.no_grad(), ema.applied():
                yield
    finally:
        for part, was in zip(parts, were_training, strict=True):
            part.training = was


@contextmanager
def interrupted_together(accelerator: Accelerator) -> Iterator[None]:
    """If any process raises `Interrupted` inside the block, raise it on every process at the end of the block."""
    interrupted = False
    try:
        yield
    except Interrupted:
        interrupted = True
    if any(gather(accelerator, interrupted)):
        raise Interrupted


def validate(
    stage: Stage,
    accelerator: Accelerator,
    *,
    seed: int,
    batch_size: int,
    poll: Callable[[], None],
    max_batches: int | None = None,
) -> dict[str, float]:
    """Compute the metrics over the whole validation set; empty for a stage without validation data.

    Whole batches are divided among the processes, and their sums are added in the order of the batches. With the same
    weights and `batch_size`, the metrics are therefore the same for any number of processes, bit for bit. The processes
    may have different numbers of batches, as nothing is exchanged before all of them have computed theirs.

    Args:
        poll: called before each batch; raises `Interrupted` if this process was asked to stop.
        max_batches: number of batches after which each process stops, to time them; None takes all rows.

    Raises:
        Interrupted: on every process, if any of them was asked to stop.
    """
    data = stage.validation_data()
    if data is None:
        return {}
    batches = uniform_batches(data, range(len(data)), batch_size)
    own = itertools.islice(batches, accelerator.process_index, None, accelerator.num_processes)
    sums: list[dict[str, float]] = []
    with interrupted_together(accelerator):
        for rows in itertools.islice(own, max_batches):
            poll()
            keys = [SampleKey(row, mix(seed, "validation", row)) for row in rows]
            batch = to_device(fetch(data, keys), accelerator.device)
            with accelerator.autocast():
                batch_sums = stage.validation_step(batch, Draws(seed, "validation", rows, accelerator.device))
            sums.append({name: float(value) for name, value in batch_sums.items()})
    total: dict[str, float] = {}
    # The first batch of each process, then the second of each, and so on; the first processes may have one more.
    for round_sums in itertools.zip_longest(*gather(accelerator, sums), fillvalue={}):
        for batch_sums in round_sums:
            _add(total, batch_sums)
    return stage.metrics(total)


def _add(total: dict[str, float], amounts: Mapping[str, float]) -> None:
    for name, amount in amounts.items():
        total[name] = total.get(name, 0.0) + amount


def print_metrics(metrics: Mapping[str, float], accelerator: Accelerator) -> None:
    """Print one metric per line on the main process."""
    if accelerator.is_main_process:
        for name, value in metrics.items():
            print(f"{name} {value:.6g}")
