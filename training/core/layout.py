"""How a global batch is split over processes and micro-batches, and how many there are in an epoch."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.tools.cli import UserError
from training.core.options import Options, option


@dataclass
class BatchConfig(Options):
    """How many images a step takes."""

    train_batch_size: int = option(16, on_resume="warn", at_least=1)
    """Images per micro-batch on one process."""
    gradient_accumulation_steps: int = option(1, on_resume="warn", at_least=1)
    """Micro-batches per process in one step."""
    validation_batch_size: int = option(0, on_resume="free", at_least=0)
    """Images per batch in validation; 0 takes `--train_batch_size`."""


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is split over processes and micro-batches.

    The positions of a global batch are dealt out micro-batch by micro-batch and, within one, process by process, so
    that any two layouts of equal `global_batch_size` train on the same set of samples in each step.
    """

    train_batch_size: int
    num_processes: int = 1
    gradient_accumulation_steps: int = 1
    rank: int = 0

    @property
    def global_batch_size(self) -> int:
        return self.train_batch_size * self.num_processes * self.gradient_accumulation_steps

    def positions(self, micro_batch: int) -> range:
        """This process's positions in the global batch for one of its micro-batches."""
        start = (micro_batch * self.num_processes + self.rank) * self.train_batch_size
        return range(start, start + self.train_batch_size)


def steps_per_epoch(num_samples: int, layout: BatchLayout) -> int:
    """Whole global batches in the data. Raises UserError when there is not one."""
    steps = num_samples // layout.global_batch_size
    if steps == 0:
        raise UserError(
            f"a batch of {layout.global_batch_size} images (--train_batch_size {layout.train_batch_size} × "
            f"{layout.num_processes} processes × --gradient_accumulation_steps {layout.gradient_accumulation_steps}) "
            f"is larger than the data set of {num_samples}; lower --train_batch_size"
        )
    return steps
