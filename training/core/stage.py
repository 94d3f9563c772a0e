"""The seam between a stage and the loop: what a stage must say, and all that the loop may ask.

A stage owns models, data and meaning; the loop owns steps, devices, files and processes. Neither looks behind this
file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from training.core.draws import Draws, SampleKey
from training.core.previews import Previews

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Batch = Mapping[str, Any]


class MapDataset(Protocol):
    """A map-style dataset whose items may depend on a key of their own, and on nothing else that is random.

    It may also implement `__getitems__(list[SampleKey])` (one call a batch), `collate(list) -> Batch`, and, for
    `--balance_by`, `classes(column) -> balance.RowClasses`: the class of each row.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, key: SampleKey, /) -> dict[str, Any]: ...


class Phase(nn.Module):
    """One optimizer's share of a step: `forward(batch, draws) -> (scalar loss, metrics)`.

    The loop wraps the Phase (DDP, compile, autocast), never the modules inside it. Registered modules are trained (as
    far as they require gradients) and saved; modules given to `borrow` are used, but neither trained nor saved here.
    """

    name: str = "train"
    learning_rate: float | None = None
    """None takes the run's `--learning_rate`."""

    def borrow(self, **modules: nn.Module) -> None:
        """Make `self.<name>` available without registering it: its owner is another phase, or nobody (frozen)."""
        for name, module in modules.items():
            object.__setattr__(self, name, module)

    def first_step(self, total_steps: int) -> int:
        """The step (from 0) of a run of `total_steps` from which this phase takes part; a discriminator starts late.

        Its learning-rate schedule begins there, and so do the EMA weights of what it alone trains.
        """
        return 0

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss is a mean over the micro-batch; metrics are detached scalars."""
        raise NotImplementedError


def _never_asked_to_stop() -> None:
    pass


@dataclass(frozen=True)
class StageContext:
    """What a stage may know of the process that builds it; the defaults are for use outside of a run."""

    device: torch.device = torch.device("cpu")
    """Where the loop moves phases and frozen modules to, once the stage is built."""
    resuming: bool = False
    """Whether the run folder has a checkpoint to resume from: initial weights will be replaced."""
    trains: bool = True
    """Whether the stage is going to be trained, rather than validated or described."""
    poll: Callable[[], None] = _never_asked_to_stop
    """Called by long work (previews, `finish`) between its parts; it raises when the run is asked to stop."""


class Stage(ABC):
    """What one training script defines; `train_encoder.py` is a short one.

    Args:
        context: what the stage may know of the process that trains it.
    """

    name: ClassVar[str]
    card_template: ClassVar[str]
    """A file in model_cards/."""

    phases: Sequence[Phase]
    """In this order at every step."""
    ema_of: Mapping[str, nn.Module] = {}
    """Modules of which an exponential moving average is kept; validation, previews and the pipeline use it."""
    frozen: Sequence[nn.Module] = ()
    """Borrowed modules that nobody trains; the loop moves them to the device."""
    best_metric: str = "val_loss"
    """The validation metric that `best` and early stopping look at."""
    best_is_lower: bool = True
    trivial_loss: float | None = None
    """The training loss of a model that has learned nothing, where it is known."""

    def __init__(self, context: StageContext):
        self.context = context

    @abstractmethod
    def train_data(self) -> MapDataset: ...

    def validation_data(self) -> MapDataset | None:
        return None

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Summable statistics of one batch (numerators, counts): the loop adds them over batches and processes.

        `draws` depend on the samples' rows alone, so every validation sees the same noise.
        """
        raise NotImplementedError

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Validation metrics, names starting with `val_`, from the sums of `validation_step`."""
        return dict(sums)

    def previews(self) -> Previews | None:
        """Images with captions, from fixed seeds, made by `pipeline()`; None shows nothing."""
        return None

    def finish(self) -> None:  # noqa: B027 - most stages have nothing to do here
        """Once, when training is done and before the final pipeline is made; every process calls it."""

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """The public pipeline over the modules as they are now."""

    def card_facts(self) -> dict[str, Any]:
        """What the model card should know beside the run's own record."""
        return {}
