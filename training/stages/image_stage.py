"""Base class of the stages that train on images: opens and checks the data, loads initial weights, samples previews."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipelines.tools.cli import UserError, printable
from training.core.batches import fetch, to_device
from training.core.checks import SMALLEST_MAP
from training.core.draws import SampleKey
from training.core.exchange import Exchange
from training.core.options import Options, option
from training.core.stage import Batch, Stage, StageContext
from training.data.aspect_buckets import BucketRule, image_sizes, share_cut_off, sort_into_buckets
from training.data.checks import require_clean
from training.data.fingerprints import dataset_fingerprint, evenly_spaced
from training.data.latent_cache.dataset import LatentCacheDataset
from training.data.source import DataConfig, folder_account, load_split
from training.engine.run_config import RunConfig
from training.engine.weights import load_initial_weights
from training.objectives.diffusion import noise_level_metrics

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("halftone")

T = TypeVar("T")

# Number of images whose sizes are read to see whether they are square, and the share of the pixels that may be cut off
# without a word: that of images of 5:4.
LOOKED_AT = 64
MUCH_CUT_OFF = 0.2
# Images of a preview are generated in batches of up to 4, of which larger images have fewer (512 / resolution): they
# keep a device busy by themselves, and processes can only divide whole batches.
MOST_PREVIEWS_AT_A_TIME, PREVIEW_SIDES_AT_A_TIME = 4, 512


@dataclass
class ImageStageConfig(RunConfig, DataConfig):
    """Flags of every stage that trains on images."""

    image_modes: ClassVar[tuple[str, ...]] = ("rgb",)

    init_from: str | None = option(None, on_resume="warn")
    """Initialize the trained model (in train_controlnet.py, the ControlNet) from another run, checkpoint or pipeline
    of the same kind and architecture; step count and optimizer start fresh"""

    @property
    def starts_trained(self) -> bool:
        return bool(self.init_from)


@dataclass
class PreviewConfig(Options):
    """Number of previews of a stage, and how they are sampled."""

    help_group = "Saving and measuring"

    num_previews: int = option(8, on_resume="free", at_least=1)
    """Number of samples in a preview"""
    preview_guidance_scale: float = option(2.0, on_resume="free")
    """Guidance scale of the previews; not used by train_image_caption.py"""
    preview_inference_steps: int = option(25, on_resume="free", at_least=1)
    """Number of inference steps for previews"""


class OpenDataset(Protocol):
    """A function that makes a stage's dataset from stored rows; `augment` turns on the augmentation of training."""

    def __call__(self, rows: Dataset, *, augment: bool) -> Any: ...


class ImageStage(Stage):
    """A stage that trains on images. A subclass opens its data, builds its models, and sets `phases` and `ema_of`.

    Attributes:
        training_set: the training data, set by `open_data`.
        validation_set: the held-out data, set by `open_data`; None where no data are held out.
        takes_aspect_buckets: whether the stage can train on images that are not square.
    """

    config: Any
    takes_aspect_buckets = False
    training_set: Any
    validation_set: Any = None

    def __init__(self, config: ImageStageConfig, context: StageContext):
        super().__init__(context)
        self.config = config
        if config.aspect_buckets and not self.takes_aspect_buckets:
            raise UserError(
                f"--aspect_buckets true: the stage '{self.name}' trains on square images only; leave the flag out"
            )

    def open_data(self, dataset: OpenDataset, divisor: int = 1, least_cells: int = SMALLEST_MAP) -> None:
        """Open the training and the held-out rows, and check that all of them can be used.

        Args:
            divisor: number of pixels of which the sides of aspect buckets must be multiples.
            least_cells: no side of an aspect bucket is shorter than this many times `divisor`.

        Raises:
            UserError: if the data do not exist, or if some rows cannot be used.
        """
        config = self.config
        self.training_set = dataset(load_split(config, "train", config.seed), augment=True)
        held_out = load_split(config, "validation", config.seed)
        self.validation_set = dataset(held_out, augment=False) if len(held_out) else None
        if not config.announcements and (account := folder_account(config)) is not None:
            logger.info("%s", printable(account.line()))
        for data in filter(None, (self.training_set, self.validation_set)):
            require_clean(data, tell=logger.info, poll=self.context.poll)
        self._check_window()
        if config.aspect_buckets:
            self._make_buckets(divisor, least_cells)
        elif self.takes_aspect_buckets and not (config.pad_to_square or config.streaming):
            self._suggest_buckets()

    def _check_window(self) -> None:
        """Refuse or report rows of remote shards that are shuffled together and do not fit into memory."""
        remote = getattr(self.training_set, "remote", None)
        if remote is not None and (problem := remote.problem(self.config.shuffle_buffer)):
            logger.warning("%s", problem)

    def _suggest_buckets(self) -> None:
        """Name the flag for images that are not square, if much of them is cut off."""
        data = self.training_set
        rows = data.dataset.select(evenly_spaced(len(data), LOOKED_AT))
        share = share_cut_off(image_sizes(rows, self.config.image_column, key=None, poll=self.context.poll))
        if share >= MUCH_CUT_OFF:
            logger.info(
                "the images are not square, and %.0f %% of their pixels are cut off; --aspect_buckets true trains on "
                "images of their own aspect ratios",
                100 * share,
            )

    def _make_buckets(self, divisor: int, least_cells: int) -> None:
        """Sort the images into aspect buckets, which are made from the ratios of the training images."""
        config, poll = self.config, self.context.poll
        batch = config.train_batch_size * config.gradient_accumulation_steps * self.context.num_processes
        rule = BucketRule(config.resolution, divisor, batch, least_cells)
        sort_into_buckets([*filter(None, (self.training_set, self.validation_set))], rule, poll)
        self.tell_sizes()

    def tell_sizes(self) -> None:
        """Log how many training images each aspect bucket has, and note it for a dry run."""
        table = self.training_set.table_of_sizes()
        self.data_notes = [f"aspect buckets (height × width) of the training images:\n{table}"]
        logger.info("%s", self.data_notes[0])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model generates by default: those of most training images."""
        return self.training_set.sizes[0]

    def train_data(self) -> Any:
        return self.training_set

    def validation_data(self) -> Any:
        return self.validation_set

    def inputs(self) -> dict[str, str]:
        """Return the fingerprint of the data, if the config names their source; a stage adds its other inputs."""
        if not self.config.source:
            return {}
        digest = hashlib.sha256()
        for data in filter(None, (self.training_set, self.validation_set)):
            is_cache = isinstance(data, LatentCacheDataset)
            digest.update(
                (data.source_fingerprint if is_cache else dataset_fingerprint(data, self.context.poll)).encode()
            )
        return {"data": digest.hexdigest()}

    def take_initial_weights(self, modules: Mapping[str, nn.Module]) -> None:
        """Copy the weights that `--init_from` names into `modules`, unless the run resumes from a checkpoint."""
        if self.config.init_from and not self.context.resuming:
            load_initial_weights(self.config.init_from, modules)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the mean loss, also by noise level if it was measured; stages with more metrics override this."""
        return {"val_loss": sums["loss"] / sums["count"], **noise_level_metrics(sums)}

    def shown_rows(self, most: int) -> Sequence[int]:
        """Return the rows that previews show: the first `most` rows of `shown_data`; in aspect buckets, the first ones
        of the size of most images in `shown_data`."""
        groups = getattr(self.shown_data, "batch_groups", None)
        if groups is None:
            return range(min(most, len(self.shown_data)))
        return (groups == torch.bincount(groups).argmax()).nonzero().flatten()[:most].tolist()

    def shown(self, exchange: Exchange, function: Callable[[Batch, Sequence[int]], Iterable[T]], most: int) -> list[T]:
        """Return the results of `function` for the batches of `shown_rows(most)`, in order, on every process.

        Args:
            function: called with each batch of this process and its rows; it returns any number of results.
        """
        rows = self.shown_rows(most)

        def of_batch(numbers: Sequence[int]) -> Iterable[T]:
            own = [rows[number] for number in numbers]
            return function(self.shown_batch(own), own)

        return self.divide(exchange, of_batch, len(rows))

    def divide(self, exchange: Exchange, function: Callable[[Sequence[int]], Iterable[T]], count: int) -> list[T]:
        """Return the results of `function` for the batches of `count` images of a preview, in order, on every process.

        Args:
            function: called with the numbers of each batch of this process; it returns any number of results.
        """

        def of_batch(numbers: Sequence[int]) -> Iterable[T]:
            self.context.poll()
            return function(numbers)

        size = max(1, min(MOST_PREVIEWS_AT_A_TIME, PREVIEW_SIDES_AT_A_TIME // self.config.resolution))
        return exchange.map(of_batch, count, size)

    def shown_batch(self, rows: Sequence[int]) -> Batch:
        """Return these rows of `shown_data` as a batch on the device."""
        return to_device(fetch(self.shown_data, [SampleKey(row, 0) for row in rows]), self.context.device)

    @property
    def shown_data(self) -> Any:
        """The data that previews show: the held-out data or, if there are none, the training data."""
        return self.validation_set or self.training_set

    def sample(self, pipeline: Any, *arguments: Any, seeds: Sequence[int], **options: Any) -> Any:
        """Generate images with the settings of the previews; a request to stop is handled between sampling steps."""
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            *arguments,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            guidance_scale=self.config.preview_guidance_scale,
            num_inference_steps=self.config.preview_inference_steps,
            callback_on_step_end=self._poll_between_steps,
            **options,
        ).images

    def _poll_between_steps(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.context.poll()
        return {}


def loss_sums(losses: Tensor) -> dict[str, Tensor]:
    """Return the sums over a batch's losses (B) from which `ImageStage.metrics` computes the mean loss."""
    return {"loss": losses.sum(), "count": torch.tensor(len(losses))}
