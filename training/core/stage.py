"""The interface between a stage and the training loop.

A stage defines models, data, losses and metrics. The loop is responsible for steps, devices, files and processes. They
use each other through the classes in this file only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from training.core.draws import Draws, SampleKey
from training.core.exchange import Exchange
from training.core.previews import Previews

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Batch = Mapping[str, Any]


class MapDataset(Protocol):
    """A map-style dataset whose random transforms are seeded by the key of each item.

    It may also implement `__getitems__(list[SampleKey])` (called once per batch; it returns a sequence of items),
    `collate(items) -> Batch`, and, for `--balance_by`, `classes(column) -> RowClasses`: the class of each row. An
    attribute `decodes_images` that is true tells that making items takes so long that other processes should do it
    beside a fast device. An attribute `batch_groups` (N, int64; None for no groups) is the group of each row: only
    items of rows of one group can be collated, as they have the same shapes. An attribute `row_blocks` (`RowBlocks`;
    None for no blocks) says which rows are stored together, and makes an epoch read them nearly in turn.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, key: SampleKey, /) -> dict[str, Any]: ...


class Phase(nn.Module):
    """The part of a step that one optimizer trains: `forward(batch, draws) -> (scalar loss, metrics)`.

    The loop wraps the Phase (DDP, compile, autocast), never the modules inside it. Registered modules are saved, and
    trained if they require gradients. Modules passed to `borrow` are used, but neither trained nor saved by this phase.
    """

    name: str = "train"
    learning_rate: float | None = None
    """Peak learning rate; None uses the run's `--learning_rate`."""

    def borrow(self, **modules: nn.Module) -> None:
        """Set `self.<name>` without registering the module, because another phase trains it or it is frozen."""
        for name, module in modules.items():
            object.__setattr__(self, name, module)

    def first_step(self, total_steps: int) -> int:
        """Return the first step (from 0) of this phase in a run of `total_steps`. A discriminator may start late.

        Its learning-rate schedule begins at this step, and so do the EMA weights of parameters that only it trains.
        """
        return 0

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, as a mean over the micro-batch, and metrics, as detached scalars."""
        raise NotImplementedError


def _never_interrupt() -> None:
    pass


@dataclass(frozen=True)
class StageContext:
    """Information for a stage about the process that builds it; the defaults are for use outside of a run."""

    device: torch.device = torch.device("cpu")
    """Device that the loop moves phases and frozen modules to after the stage is built."""
    resuming: bool = False
    """Whether the run folder has a checkpoint to resume from, which will replace the initial weights."""
    trains: bool = True
    """Whether the stage will be trained, rather than only validated or described."""
    poll: Callable[[], None] = _never_interrupt
    """To be called now and then during long work (previews, `finish`); raises if the run was asked to stop."""
    num_processes: int = 1
    """Number of processes that train together."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements of generated images.

    Attributes:
        metrics: their names start with `eval_`, so that they cannot be confused with validation metrics.
        may_be_best: whether this checkpoint may become the best one.
        warnings: sentences for the user.
        beyond_limits: whether something became worse than the stage allows; the run stops at the second such
            measurement in a row.
    """

    metrics: Mapping[str, float]
    may_be_best: bool = True
    warnings: Sequence[str] = ()
    beyond_limits: bool = False


class Stage(ABC):
    """Base class of stages; each training script defines one. `train_encoder.py` is a short example.

    Args:
        context: information about the process that trains the stage.
    """

    name: ClassVar[str]
    card_template: ClassVar[str]
    """Template of the model card, a file in model_cards/."""

    phases: Sequence[Phase]
    """The phases of each step, in their order."""
    ema_of: Mapping[str, nn.Module] = {}
    """Modules with EMA weights, which validation, previews and the pipeline use."""
    frozen: Sequence[nn.Module] = ()
    """Modules that no phase trains; the loop freezes them and moves them to the device. The parameters of a phase in
    them, such as those of an adapter, stay trainable."""
    best_metric: str = "val_loss"
    """Metric that the `best` checkpoint and early stopping depend on, of the validation or of `evaluate` (`eval_…`)."""
    best_is_lower: bool = True
    """Whether a lower value of `best_metric` is better."""
    exports_best: bool = False
    """Whether a complete run exports its best weights, rather than its last ones."""
    trivial_loss: float | None = None
    """Training loss of a model that has learned nothing, if it is known."""
    conditions: Sequence[str] = ()
    """What images are generated from, in words for messages: captions, classes, briefs, control images."""

    data_notes: Sequence[str] = ()
    """Sentences about the training data for a dry run."""

    def __init__(self, context: StageContext):
        self.context = context

    @abstractmethod
    def train_data(self) -> MapDataset: ...

    def validation_data(self) -> MapDataset | None:
        return None

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return statistics of one batch (numerators and counts), which the loop sums over batches and processes.

        `draws` depend only on the rows of the samples, so that every validation has the same noise.
        """
        raise NotImplementedError

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Compute the validation metrics from the sums of `validation_step`; their names start with `val_`."""
        return dict(sums)

    def evaluate(self, exchange: Exchange, *, distances: bool, copies: bool) -> Evaluation | None:
        """Generate images and measure them; None for a stage that cannot.

        Every process calls it, generates its share of the images, and returns the same result.

        Args:
            distances: whether to measure how close the images are to real ones.
            copies: whether to search for copies of training images.
        """
        return None

    def evaluation_seconds(self, exchange: Exchange, *, distances: bool, copies: bool) -> float:
        """Estimate the seconds of `evaluate` from a part of its images; every process calls it.

        Work that only the first evaluation has to do is done here, and is not part of the estimate.
        """
        return 0.0

    def without_best(self, exchange: Exchange) -> Mapping[str, float] | None:
        """Called before the export of a run without a checkpoint that may be the best one; every process calls it.

        Returns:
            The measurements of what the stage exports in place of its last weights; None if it exports these.
        """
        return None

    def previews(self, exchange: Exchange) -> Previews | None:
        """Generate images with fixed seeds and the pipeline, and return them with captions; None shows nothing.

        Every process calls it, generates its share of the images, and returns the same result.
        """
        return None

    def finish(self, exchange: Exchange) -> None:  # noqa: B027 - most stages have nothing to do here
        """Called once on every process, after training and before the final pipeline is built.

        Every process does its share of long work. A request to stop that any of them receives ends all of them here, at
        once, and the same command calls this again; only finished files may be written, on the main process.
        """

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """Return the public pipeline with the current weights of the modules."""

    def save_pipeline(self, folder: Path) -> None:
        """Save the public pipeline into `folder`; a stage may add files, such as those of an adapter alone."""
        self.pipeline().save_pretrained(folder)

    def usage(self, model: str) -> str | None:
        """Return a command that shows what the exported model does, such as one that generates images; None if there
        is none.

        Args:
            model: the run folder.
        """
        return None

    def conclusions(self, rows: Sequence[Mapping[str, str]], steps_per_epoch: int) -> list[str]:
        """Return sentences about what a complete run shows, for its end; none by default.

        Args:
            rows: the rows of metrics.csv, as texts.
        """
        return []

    def inputs(self) -> dict[str, str]:
        """Return a fingerprint of the content of each input (data, VAE, …), the same wherever the input is stored.

        It is called once, on the main process, before training. A checkpoint contains the result, and a run resumes
        only with inputs of the same content. The keys are those of `option(content=…)`.
        """
        return {}

    def card_facts(self) -> dict[str, Any]:
        """Return values for the model card, in addition to the run's record."""
        return {}
