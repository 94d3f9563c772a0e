"""Running a stage's models for looking at them: averaged weights, eval mode, every process its share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from training.core.batches import fetch, to_device
from training.core.draws import Draws, SampleKey, mix
from training.core.stage import Stage
from training.engine.ema import EMA
from training.engine.signals import Interrupted

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def evaluating(modules: Iterable[nn.Module], ema: EMA | None) -> Iterator[None]:
    """Averaged weights, eval mode and no gradients inside; all as it was after, whatever happens."""
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


def validate(stage: Stage, accelerator: Accelerator, seed: int, batch_size: int) -> dict[str, float] | None:
    """Validation metrics over the whole validation set, or None when it was interrupted on any process.

    Rows are dealt out to the processes; nothing is exchanged until the end, so uneven shares do no harm.
    """
    data = stage.validation_data()
    if data is None:
        return {}
    rows = range(accelerator.process_index, len(data), accelerator.num_processes)
    sums: dict[str, float] = {}
    interrupted = False
    try:
        for start in range(0, len(rows), batch_size):
            stage.poll()
            share = rows[start : start + batch_size]
            batch = to_device(
                fetch(data, [SampleKey(row, mix(seed, "validation", row)) for row in share]), accelerator.device
            )
            with accelerator.autocast():
                found = stage.validation_step(batch, Draws(seed, "validation", share, accelerator.device))
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    except Interrupted:
        interrupted = True
    shares = gather(accelerator, (interrupted, sums))
    if any(was_interrupted for was_interrupted, _ in shares):
        return None
    total: dict[str, float] = {}
    for _, share_sums in shares:
        for name, amount in share_sums.items():
            total[name] = total.get(name, 0.0) + amount
    return stage.metrics(total)


def validate_only(stage: Stage, accelerator: Accelerator, seed: int, batch_size: int) -> bool:
    """Validate the stage's models as they are, outside any run, and print the figures; False after a stop."""
    for module in (*stage.frozen, *stage.phases):
        module.to(accelerator.device)
    with evaluating([*stage.frozen, *stage.phases], None):
        metrics = validate(stage, accelerator, seed, batch_size)
    print_metrics(metrics, accelerator)
    return metrics is not None


def print_metrics(metrics: Mapping[str, float] | None, accelerator: Accelerator) -> None:
    """One figure a line, on the main process."""
    if accelerator.is_main_process:
        for name, value in (metrics or {}).items():
            print(f"{name} {value:.6g}")


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """One small object from each process, in order of rank, on every process."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
