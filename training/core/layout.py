"""Splitting a global batch over processes and micro-batches, and the number of global batches per epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines.tools.cli import UserError
from training.core.options import Options, option


@dataclass
class BatchConfig(Options):
    """Options for the number of images per step."""

    help_group = "Length"

    train_batch_size: int = option(16, on_resume="warn", at_least=1, essential=True)
    """Batch size per process (of one micro-batch)"""
    gradient_accumulation_steps: int = option(1, on_resume="warn", at_least=1)
    """Number of micro-batches to accumulate before each optimizer step"""
    validation_batch_size: int = option(0, on_resume="free", at_least=0)
    """Batch size for validation; 0 uses --train_batch_size"""
    auto_batch_size: bool = option(False, on_resume="free")
    """If the memory of the device is too small for a micro-batch, divide it by two and accumulate twice as many, as
    often as necessary. The global batch stays the same, and a resumed run begins with the size that fitted"""


@dataclass(frozen=True)
class BatchLayout:
    """The split of a global batch over processes and micro-batches.

    The positions of a global batch are assigned micro-batch by micro-batch and, within each, process by process. Any
    two layouts with the same `global_batch_size` therefore train on the same set of samples in each step.
    """

    train_batch_size: int
    num_processes: int = 1
    gradient_accumulation_steps: int = 1
    rank: int = 0

    @property
    def global_batch_size(self) -> int:
        return self.train_batch_size * self.num_processes * self.gradient_accumulation_steps

    def smaller(self) -> BatchLayout | None:
        """Return the layout with half the micro-batch and twice the accumulation; None for a micro-batch of one.

        A micro-batch of an odd size is divided by its smallest factor.
        """
        size = self.train_batch_size
        factor = next((n for n in range(2, size + 1) if size % n == 0), None)
        if factor is None:
            return None
        return replace(
            self,
            train_batch_size=size // factor,
            gradient_accumulation_steps=self.gradient_accumulation_steps * factor,
        )

    def positions(self, micro_batch: int) -> range:
        """Return the positions in the global batch of one of this process's micro-batches."""
        start = (micro_batch * self.num_processes + self.rank) * self.train_batch_size
        return range(start, start + self.train_batch_size)


def steps_per_epoch(num_samples: int, layout: BatchLayout, groups: Tensor | None = None) -> int:
    """Return the number of global batches in an epoch. Raises UserError when the data are fewer than one batch.

    Args:
        groups: the group of each row if the rows of a global batch must be of one group. All rows of each group are
            then drawn, and the last batch of a group is filled; without groups, only complete batches are counted.
    """
    steps = num_samples // layout.global_batch_size
    if steps and groups is not None:
        steps = sum(-(-count // layout.global_batch_size) for count in torch.bincount(groups).tolist())
    if steps == 0:
        raise UserError(
            f"a batch of {layout.global_batch_size} images (--train_batch_size {layout.train_batch_size} × "
            f"{layout.num_processes} processes × --gradient_accumulation_steps {layout.gradient_accumulation_steps}) "
            f"is larger than the data set of {num_samples} images; lower --train_batch_size"
        )
    return steps
