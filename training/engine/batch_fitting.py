"""Memory that runs out in a step: smaller micro-batches with the same global batch, or a report of what took it.

With `--auto_batch_size true`, one step of every phase is tried before the first step, and all processes agree on the
largest micro-batch that fits. Where a later batch needs more, a single process repeats the step with a smaller one.
Several processes cannot, as the others wait in an exchange of gradients: the run ends, and resumes with a smaller one.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipelines.tools.cli import UserError, one_line
from pipelines.tools.devices import release_cached_memory
from training.core.files import read_json_object, write_json
from training.core.layout import BatchConfig, BatchLayout
from training.core.memory import is_out_of_memory, peak_memory_mib
from training.engine.activations import measure_activations
from training.engine.launch import gather, on_main
from training.engine.phase_runner import MemoryFull, PhaseRunner
from training.engine.training import Training
from training.run.folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")

FITTED_FILE = "batch.json"
RESOLUTIONS_NAMED = 3


def fitted_layout(config: BatchConfig, folder: RunFolder, accelerator: Accelerator) -> BatchLayout:
    """Return how the global batch is divided: by the flags, or smaller if earlier sessions found that it has to be."""
    layout = BatchLayout(
        config.train_batch_size,
        accelerator.num_processes,
        config.gradient_accumulation_steps,
        accelerator.process_index,
    )
    if not config.auto_batch_size:
        return layout
    size = on_main(accelerator, lambda: _saved_size(folder.path))
    while size < layout.train_batch_size and (smaller := layout.smaller()) is not None:
        layout = smaller
    if layout.train_batch_size != config.train_batch_size and accelerator.is_main_process:
        logger.info("using %s, as an earlier session found that more does not fit", _described(layout))
    return layout


def _saved_size(folder: Path) -> int:
    """Return the size of a micro-batch that fitted in an earlier session; a huge one if none was too large."""
    size = (read_json_object(folder / FITTED_FILE) or {}).get("train_batch_size")
    return size if isinstance(size, int) and size > 0 else 2**31


class BatchFitting:
    """Makes the micro-batches of a run smaller if the memory runs out, or ends it with a report."""

    def __init__(self, training: Training, config: BatchConfig, accelerator: Accelerator, folder: RunFolder):
        self.training, self.accelerator, self.folder = training, accelerator, folder
        self.automatic = config.auto_batch_size

    def try_a_step(self) -> None:
        """With `--auto_batch_size true`, find the largest micro-batch that fits; every process calls it.

        Raises:
            UserError: on every process, if not even a micro-batch of one fits.
        """
        while self.automatic and self.training.shards is None:
            full = self._try_phases()
            first = next((one for one in gather(self.accelerator, full) if one is not None), None)
            if first is None:
                return
            self._divide(first)

    def _try_phases(self) -> MemoryFull | None:
        """Try a forward and a backward pass of each phase, beside the optimizer states of all of them."""
        full = None
        # A new optimizer has no states yet; this takes as much memory as its two moments.
        states = [
            torch.empty_like(parameter)
            for runner in self.training.runners
            if not runner.optimizer.state
            for parameter in 2 * runner.parameters
        ]
        for runner in self.training.runners:
            full = full or runner.try_step(*self.training.batches.first())
        del states
        self._free(full)
        return full

    def in_step(self, step: int, full: MemoryFull) -> None:
        """Make the micro-batches smaller, after the memory ran out in `step` (from 0).

        Raises:
            UserError: the step cannot be repeated: by `--auto_batch_size false`, or with several processes.
        """
        self._free(full)
        alone = self.accelerator.num_processes == 1
        if self.automatic and alone:
            self._divide(full, step)
            return
        smaller = self.training.layout.smaller()
        if self.automatic and smaller is not None:
            self._remember(smaller)
            raise UserError(
                f"{self._report(full, step)}. Run the same command again: it resumes with {_described(smaller)}"
            )
        raise UserError(f"{self._report(full, step)}. {_advice(self.training.layout, self.automatic)}")

    def _divide(self, full: MemoryFull, step: int | None = None) -> None:
        smaller = self.training.layout.smaller()
        if smaller is None:
            raise UserError(f"{self._report(full, step)}. {_advice(self.training.layout, self.automatic)}")
        if self.accelerator.is_main_process:
            logger.warning("%s; the run continues with %s", self._report(full, step), _described(smaller))
            self._remember(smaller)
        self.training.divide_batches(smaller)

    def _remember(self, layout: BatchLayout) -> None:
        with contextlib.suppress(OSError):  # the next session finds it again
            write_json(self.folder.path / FITTED_FILE, {"train_batch_size": layout.train_batch_size})

    def _free(self, full: MemoryFull | None) -> None:
        """Give the memory of an attempt back; it may be cut into pieces that are too small for the next one."""
        for runner in self.training.runners:
            runner.zero_grad()
        gc.collect()
        if full is not None:
            release_cached_memory(self.training.device)

    def _report(self, full: MemoryFull, step: int | None) -> str:
        """Return what is known of the memory, without the last full stop."""
        when = "a step was tried" if step is None else f"step {step + 1} was taken"
        layout, device = self.training.layout, self.training.device
        parts = [
            f"the memory of the {_kind(device)} ran out when {when} (phase '{full.phase}', "
            f"--train_batch_size {layout.train_batch_size}: {full.batch}): {full.reason.rstrip('.')}"
        ]
        peak = peak_memory_mib(device)
        if peak is not None:
            parts.append(f"The process had used up to {peak:,.0f} MiB")
        state = sum(_state_bytes(runner) for runner in self.training.runners)
        parts.append(f"Weights, gradients and optimizer take about {state / 2**20:,.0f} MiB")
        with contextlib.suppress(Exception):  # even one sample may not fit, and the report is due nevertheless
            parts.append(self._activations(full.phase))
        return ". ".join(parts)

    def _activations(self, name: str) -> str:
        """Measure the activations of one sample; return them as a sentence, the largest resolutions first."""
        phase = next(phase for phase in self.training.stage.phases if phase.name == name)
        with self.accelerator.autocast():
            measured = measure_activations(phase, *self.training.batches.first_sample())
        count = self.training.layout.train_batch_size
        largest = sorted(measured.bytes_at.items(), key=lambda item: -item[1])[:RESOLUTIONS_NAMED]
        shares = [f"{size * count / 2**20:,.1f} MiB at {h}×{w}" for (h, w), size in largest]
        whole = f"The outputs of its layers take about {measured.bytes * count / 2**20:,.0f} MiB"
        return f"{whole} ({', '.join(shares)})" if shares else whole


@contextmanager
def reporting_full_memory(training: Training) -> Iterator[None]:
    """Turn an error about the memory, from anything inside the block except a step, into a message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the memory of the {_kind(training.device)} ran out outside of a step, at step {training.state.step} "
            f"({one_line(error, 200)}). Lower --validation_batch_size (it is --train_batch_size if unset), "
            "--num_previews or --evaluation_images, and run the same command again to resume from the last checkpoint"
        ) from None


def _advice(layout: BatchLayout, automatic: bool) -> str:
    smaller = layout.smaller()
    again = "and run the same command again to resume from the last checkpoint"
    if smaller is None:
        return f"Not even one image fits: lower --resolution or the size of the model, {again}"
    by_itself = "" if automatic else ", or --auto_batch_size true, which does so by itself"
    return f"Add {_flags(smaller)}, which trains the same model{by_itself}, or --gradient_checkpointing true, {again}"


def _flags(layout: BatchLayout) -> str:
    return (
        f"--train_batch_size {layout.train_batch_size} "
        f"--gradient_accumulation_steps {layout.gradient_accumulation_steps}"
    )


def _described(layout: BatchLayout) -> str:
    return f"{_flags(layout)} (the global batch is still {layout.global_batch_size})"


def _kind(device: torch.device) -> str:
    return "machine" if device.type == "cpu" else "GPU"


def _state_bytes(runner: PhaseRunner) -> int:
    """Return the bytes of weights, gradients and two moments of a phase on this process."""
    return 4 * sum(p.numel() * p.element_size() for p in runner.parameters)
