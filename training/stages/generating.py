"""Base class of the stages that generate images: measures them during training, by --evaluation_epochs and the like."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.tools.cli import UserError
from training.core.exchange import Exchange
from training.core.options import Options, option
from training.core.stage import Evaluation, StageContext
from training.data.aspect_buckets import AspectBuckets
from training.data.images import ImageDataset
from training.data.source import load_split
from training.evaluation.copies import KeptThumbnails
from training.evaluation.data import RealImages, conditions_of, plain_images
from training.metrics.features import CHUNK, DEFAULT_EXTRACTOR, FeatureExtractor, open_extractor
from training.metrics.generators import ImageGenerator, Item, SamplingConfig, generator_of
from training.metrics.memorization import TOLERANCE, CopyReport
from training.metrics.quality import measure_distances, measure_floor
from training.reporting.sufficiency import is_it_enough
from training.stages.image_stage import ImageStage, ImageStageConfig

# Of what `measure_distances` returns; the others vary too much with few images.
SHOWN = ("kid", "kid_standard_error", "fd", "precision", "recall", "coverage")
# Share of the images that are generated to estimate the time of an evaluation.
TIMED_SHARE = 0.1
# The largest batch that is generated. Processes divide whole batches, so that results do not depend on their number;
# with larger ones, the 256 images of an evaluation would leave GPUs without work.
MOST_AT_A_TIME = 32


@dataclass
class RunEvaluationConfig(Options):
    """How generated images are measured during a run. training/evaluate.py measures more."""

    help_group = "Saving and measuring"

    evaluation_images: int = option(256, on_resume="warn", at_least=8)
    """Number of images generated for each measurement of --evaluation_epochs, --evaluation_steps and
    --memorization_epochs"""
    evaluation_inference_steps: int = option(15, on_resume="warn", at_least=1)
    """Number of sampling steps for these images"""
    evaluation_guidance_scale: float | None = option(None, on_resume="warn", at_least=0)
    """Guidance scale for these images; if unset, --preview_guidance_scale"""
    evaluation_real_images: int = option(1000, on_resume="warn", at_least=8)
    """Maximum number of real images of each split that they are compared with; their features are computed once"""
    evaluation_extractor: str = option(DEFAULT_EXTRACTOR, on_resume="warn")
    """Network whose features are compared: efficientnet-lite0, or the Hub id or folder of a vision model of
    Transformers"""
    evaluation_extractor_resolution: int | None = option(128, on_resume="warn", at_least=32)
    """Width and height to which images are resized for the extractor; null for that of the extractor"""
    max_copy_rate: float | None = option(TOLERANCE, on_resume="warn", at_least=0, at_most=1)
    """A checkpoint cannot become the best one if the rate of copied training images among generated ones is above the
    rate of false positives by more than this, with 95 % confidence; null accepts any rate"""


class GeneratingStage(ImageStage):
    """A stage whose pipeline generates images for rows of the data."""

    draws_one_size = True
    """Whether images are generated in the default size of the pipeline, and not in that of their control images."""
    shown_distances: Sequence[str] = SHOWN
    """Which distances of generated images from real ones are logged."""
    _real_features: Tensor | None = None
    _floor: Mapping[str, Any] = {}
    _kept_thumbnails: KeptThumbnails | None = None

    def __init__(self, config: ImageStageConfig, context: StageContext):
        super().__init__(config, context)
        measures = config.evaluation_epochs or config.evaluation_steps or config.memorization_epochs
        if measures and context.trains and not config.source:
            raise UserError(
                "--evaluation_epochs and the like compare generated images with real ones, and a latent cache has "
                "none; give --train_data_dir or --dataset_name as well"
            )

    def evaluate(self, exchange: Exchange, *, distances: bool, copies: bool) -> Evaluation:
        images = self._evaluated_images(exchange, self.config.evaluation_images)
        return self._measured(images, exchange, distances=distances, copies=copies)

    def evaluation_seconds(self, exchange: Exchange, *, distances: bool, copies: bool) -> float:
        """Estimate the seconds of `evaluate`: a tenth of the images is generated, rounded up to whole batches.

        They are then repeated and measured as all images are, since that time is not proportional to their number.
        """
        whole, batch = self.config.evaluation_images, self._generated_at_a_time * exchange.num_processes
        count = min(whole, batch * math.ceil(TIMED_SHARE * whole / batch))
        self._evaluated_images(exchange, min(count, batch))  # the first batch chooses kernels and allocates memory
        if distances:
            self._measure_real_images(exchange)
        if copies:
            self._thumbnails_of_real(exchange)
        started = time.perf_counter()
        images = self._evaluated_images(exchange, count)
        generation = time.perf_counter() - started
        repeated = (images * math.ceil(whole / count))[:whole]
        self._measured(repeated, exchange, distances=distances, copies=copies)
        return time.perf_counter() - started + generation * (whole / count - 1)

    def conclusions(self, rows: Sequence[Mapping[str, str]], steps_per_epoch: int) -> list[str]:
        return is_it_enough(rows, len(self.training_set), self.config.evaluation_images, steps_per_epoch)

    def _measured(
        self, images: Sequence[Image.Image], exchange: Exchange, *, distances: bool, copies: bool
    ) -> Evaluation:
        metrics: dict[str, float] = {}
        warnings: list[str] = []
        if distances:
            metrics |= self._evaluated_distances(self._features_of(images, exchange), exchange)
        may_be_best = True
        if copies:
            report = self._thumbnails_of_real(exchange).report(images, exchange, self.context.poll)
            metrics["eval_copy_rate"] = report.copy_rate
            metrics["eval_copy_rate_expected"] = report.false_positive_rate
            limit = self.config.max_copy_rate
            may_be_best = limit is None or not report.exceeds(limit)
            if report.exceeds(TOLERANCE):
                warnings.append(_copy_warning(report))
        return Evaluation(metrics, may_be_best, warnings)

    def _evaluated_images(self, exchange: Exchange, count: int) -> list[Image.Image]:
        return self._images_of(self.pipeline(), self._conditions, exchange, count)

    def _images_of(
        self, pipeline: Any, conditions: Callable[[Sequence[int]], Sequence[Item]], exchange: Exchange, count: int
    ) -> list[Image.Image]:
        """Generate images with a pipeline, for the rows that `conditions` returns for their numbers."""
        config = self.config
        guidance = config.evaluation_guidance_scale
        sampling = SamplingConfig(
            num_inference_steps=config.evaluation_inference_steps,
            guidance_scale=config.preview_guidance_scale if guidance is None else guidance,
            seed=config.seed,
        )
        generator: ImageGenerator = generator_of(pipeline, sampling)

        def some(numbers: Sequence[int]) -> list[Image.Image]:
            self.context.poll()
            return generator(conditions(numbers), numbers, self.context.poll)

        return exchange.map(some, count, self._generated_at_a_time)

    @property
    def _generated_at_a_time(self) -> int:
        """The number of images in a batch. Processes divide whole batches among them, so there should be several."""
        return min(self.config.train_batch_size, MOST_AT_A_TIME)

    def _conditions(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows for these images: held-out and training rows in turn, since the captions of training images
        are those for which a model is likeliest to copy."""
        found: dict[int, dict[str, Any]] = {}
        for remainder, data in enumerate((self.shown_data, self.training_set)):
            if own := [number for number in numbers if number % 2 == remainder]:
                found |= dict(zip(own, conditions_of(data, [number // 2 for number in own]), strict=True))
        return [found[number] for number in numbers]

    def _features_of(self, images: Sequence[Image.Image], exchange: Exchange) -> Tensor:
        """Return the features of generated images: m D, on every process."""

        def some(numbers: Sequence[int]) -> Tensor:
            self.context.poll()
            return self._extractor([images[number] for number in numbers])

        return torch.cat(exchange.map_batches(some, len(images), CHUNK))

    def _evaluated_distances(self, features: Tensor, exchange: Exchange) -> dict[str, float]:
        """Return the distances that a measurement during the run has; a subclass may add some."""
        return self._distances(features, exchange)

    def _distances(self, features: Tensor, exchange: Exchange) -> dict[str, float]:
        real = self._measure_real_images(exchange)
        found = exchange.on_main(lambda: measure_distances(real, features).values)
        metrics = {f"eval_{name}": found[name] for name in self.shown_distances if name in found}
        return metrics | ({"eval_kid_floor": self._floor["kid"]["mean"]} if "kid" in self._floor else {})

    def _measure_real_images(self, exchange: Exchange) -> Tensor:
        """Return the features of the real images; the first call computes them and their floor."""
        if self._real_features is None:
            parts = [split.features(self._extractor, exchange, self.context.poll) for split in self._real]
            real = torch.cat(parts)
            self._floor = measure_floor(real, self.config.evaluation_images, exchange=exchange)
            self._real_features = real
        return self._real_features

    def _thumbnails_of_real(self, exchange: Exchange) -> KeptThumbnails:
        """Return the search for copies; the first call reads all training images and the held-out images in `_real`."""
        if self._kept_thumbnails is None:
            some, *held_out = self._real
            training = RealImages("train", some.data, len(some.data))
            self._kept_thumbnails = KeptThumbnails(
                training, held_out[0] if held_out else None, exchange, self.context.poll
            )
        return self._kept_thumbnails

    @cached_property
    def _extractor(self) -> FeatureExtractor:
        config = self.config
        return open_extractor(config.evaluation_extractor, config.evaluation_extractor_resolution, self.context.device)

    @cached_property
    def _real(self) -> list[RealImages]:
        """Training images and held-out ones, up to `evaluation_real_images` of each."""
        config = self.config
        found: list[RealImages] = []
        buckets = None
        if config.aspect_buckets:  # real images are compared in the sizes of generated ones
            buckets = AspectBuckets((self.image_size,) if self.draws_one_size else self.training_set.sizes)
        for name, own in (("train", self.training_set), ("validation", self.validation_set)):
            if isinstance(own, ImageDataset) and own.crop_scale == 1 and buckets is None:
                data = own.without_augmentation()  # images that training keeps in memory are not decoded again
            elif len(rows := load_split(config, name, config.seed)):
                data = plain_images(rows, config, buckets)
            else:
                continue
            found.append(RealImages(name, data, config.evaluation_real_images))
        return found


def _copy_warning(report: CopyReport) -> str:
    return (
        f"{report.copies} of {report.num_images} generated images are copies of training images "
        f"({report.copy_rate:.1%}; {report.false_positive_rate:.1%} are expected of a model that does not copy). "
        "Train for fewer steps (--best_metric kid keeps an earlier checkpoint), train on more images, or remove "
        "duplicates, which data_scripts/check_dataset.py finds"
    )
