"""Measurements of a poster decoder before and after it is trained further, with limits for what may become worse.

N posters for held-out briefs. The decoder before is a frozen copy of the initial weights, so that its measurements are
the same in every session of a run.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from pipelines.tools.grids import comparison_grid
from pipelines.tools.private import without_private
from training.core.exchange import Exchange
from training.core.files import write_atomically, write_json
from training.core.options import Options, option
from training.core.previews import save_png
from training.core.stage import Evaluation
from training.data.briefs import BriefedPosters
from training.data.source import load_all_splits, load_split
from training.evaluation.cycle import READ_AT_A_TIME, cycle_scores, report_table
from training.evaluation.data import conditions_of
from training.metrics.distances import diversity, kernel_distance_change
from training.metrics.images import to_pil
from training.metrics.quality import measure_floor
from training.models.reader import PosterReader
from training.stages.decoding import DecodingStage
from training.stages.generating import SHOWN

logger = logging.getLogger("halftone")

REPORT_FILE, TABLE_FILE, GRID_FILE = "finetuning.json", "finetuning.md", "before_after.png"
PREFIX = "eval_"
KEPT = (
    "no checkpoint has a finite cycle score within the limits of --max_kid_rise, --max_diversity_fall and "
    "--max_copy_rate, so the decoder is exported as it was before"
)


@dataclass
class BeforeAfterConfig(Options):
    """Limits for what may become worse, and the report at the end."""

    help_group = "Saving and measuring"

    max_kid_rise: float = option(0.005, on_resume="warn", at_least=0)
    """A checkpoint cannot become the best one if the distance of its posters from real ones (KID) is larger than before
    by more than this, and by more than --max_kid_rise_errors. A run stops at the second measurement in a row beyond
    this limit or that of --max_diversity_fall"""
    max_kid_rise_errors: float = option(2.0, on_resume="warn", at_least=0)
    """A rise of KID counts only from this number of its standard errors on. Posters before and after are for the same
    briefs and from the same noise, so this is the standard error of the difference of the pairs"""
    max_diversity_fall: float = option(0.05, on_resume="warn", at_least=0, at_most=1)
    """A checkpoint cannot become the best one if the diversity of its posters is lower than before by more than this
    fraction"""
    report_split: str = option("test", on_resume="free")
    """Split whose briefs the posters of the report are generated for; if the dataset does not have it, the posters that
    were held out"""
    report_images: int | None = option(None, on_resume="free", at_least=8)
    """Number of posters before and of posters after that the report is about; if unset, --evaluation_images"""
    report_rows: int = option(8, on_resume="free", at_least=1)
    """Number of rows of before_after.png, which shows posters for the same briefs and noise before and after"""


class BeforeAfterStage(DecodingStage):
    """A stage that trains a trained decoder further, measured by readers. A subclass sets the attributes.

    Attributes:
        original: the decoder before, its network and its brief encoder by their names in the pipeline, frozen.
        reader: reads generated posters during training.
        judge: reads them in the report only; None for none.
    """

    best_metric = "eval_cycle_score"
    exports_best = True
    shown_distances = (*SHOWN, "diversity")
    original: nn.ModuleDict
    reader: PosterReader
    judge: PosterReader | None
    _before: Mapping[str, float] | None = None
    _features_before: Tensor | None = None
    _report: Mapping[str, Any] | None = None
    _keeps_original = False

    def evaluation_seconds(self, exchange: Exchange, *, distances: bool, copies: bool) -> float:
        if distances:
            self._measured_before(exchange)
        return super().evaluation_seconds(exchange, distances=distances, copies=copies)

    def conclusions(self, rows: Sequence[Mapping[str, str]], steps_per_epoch: int) -> list[str]:
        return []  # those of other stages are about a model that approaches real images; the report is about this one

    def finish(self, exchange: Exchange) -> None:
        """Measure the decoder before and after on briefs that neither training nor the choice of a checkpoint used."""
        data = self._report_data()
        count = self._report_count
        before = self._posters(self.pipeline_of(self.original), data, exchange, count)
        after = before if self._keeps_original else self._posters(self.pipeline(), data, exchange, count)
        posters = {"before": before, "after": after}
        features = {name: self._features_of(own, exchange) for name, own in posters.items()}
        measured = {name: self._measurements(own, features[name], data, exchange) for name, own in posters.items()}
        measured["after"] |= self._kid_change(features["before"], features["after"], exchange)
        measured["real"], floor = self._of_real_posters(data, exchange)
        self._report = {**measured, "facts": self._facts(data, measured, floor)}
        report = self._report
        exchange.on_main(lambda: self._write_report(report, posters, data))

    def without_best(self, exchange: Exchange) -> Mapping[str, float] | None:
        """Export the decoder as it was before, and return its measurements."""
        self._keeps_original = True
        if exchange.is_main:
            logger.warning("%s", KEPT)
        return self._measured_before(exchange)

    def networks(self) -> dict[str, Any]:
        return dict(self.original.items()) if self._keeps_original else super().networks()

    def card_facts(self) -> dict[str, Any]:
        if self._report is None:
            return {}
        return {"finetuning": {"table": report_table(self._report), "notes": report_notes(self._report["facts"])}}

    def pipeline_of(self, modules: Mapping[str, nn.Module]) -> Any:
        """Return the pipeline of a decoder with these modules, which samples as that of this stage."""
        pipeline = self.pipeline()
        return type(pipeline)(**{"unet": None, **modules}, scheduler=pipeline.scheduler)

    def _conditions(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return held-out rows alone: a decoder is measured by briefs that it was not trained on."""
        return conditions_of(self.shown_data, numbers)

    def _measured(
        self, images: Sequence[Image.Image], exchange: Exchange, *, distances: bool, copies: bool
    ) -> Evaluation:
        before = self._measured_before(exchange) if distances else {}
        measured = super()._measured(images, exchange, distances=distances, copies=copies)
        if not distances:
            return measured
        read = self._read(images, self.shown_data, self.reader, exchange)
        metrics = {**measured.metrics, **{PREFIX + name: value for name, value in read.items()}}
        worse = beyond_limits(before, metrics, self.config)
        may_be_best = measured.may_be_best and not worse
        return Evaluation(metrics, may_be_best, [*measured.warnings, *worse], beyond_limits=bool(worse))

    def _evaluated_distances(self, features: Tensor, exchange: Exchange) -> dict[str, float]:
        change = {} if self._features_before is None else self._kid_change(self._features_before, features, exchange)
        return {**self._distances(features, exchange), **{PREFIX + name: value for name, value in change.items()}}

    def _kid_change(self, before: Tensor, after: Tensor, exchange: Exchange) -> dict[str, float]:
        """Return the paired difference of KID and its standard error; empty for too few images."""
        real = self._measure_real_images(exchange)

        def computed() -> dict[str, float]:
            try:
                change = kernel_distance_change(real, before, after)
            except ValueError:
                return {}
            return {"kid_change": change.value, "kid_change_standard_error": change.standard_error}

        return exchange.on_main(computed)

    def _measured_before(self, exchange: Exchange) -> Mapping[str, float]:
        """Return the measurements of the decoder before; the first call in a session makes them."""
        if self._before is None:
            original, count = self.pipeline_of(self.original), self.config.evaluation_images
            images = self._posters(original, self.shown_data, exchange, count)
            read = self._read(images, self.shown_data, self.reader, exchange)
            self._features_before = self._features_of(images, exchange)
            own = self._distances(self._features_before, exchange)
            self._before = {**own, **{PREFIX + name: value for name, value in read.items()}}
            if exchange.is_main:
                shown = ", ".join(f"{name} {value:.4g}" for name, value in self._before.items())
                logger.info("before: %s", shown)
        return self._before

    @property
    def _report_count(self) -> int:
        return self.config.report_images or self.config.evaluation_images

    def _posters(self, pipeline: Any, data: BriefedPosters, exchange: Exchange, count: int) -> list[Image.Image]:
        return self._images_of(pipeline, functools.partial(conditions_of, data), exchange, count)

    def _read(
        self, images: Sequence[Image.Image], data: BriefedPosters, reader: PosterReader, exchange: Exchange
    ) -> dict[str, float]:
        briefs = [data.brief(number % len(data)) for number in range(len(images))]
        return cycle_scores(images, briefs, reader.pipeline(), exchange, self.context.poll)

    def _read_by_all(self, images: Sequence[Image.Image], data: BriefedPosters, exchange: Exchange) -> dict[str, float]:
        readers = {"reader": self.reader, **({"judge": self.judge} if self.judge is not None else {})}
        read = {name: self._read(images, data, reader, exchange) for name, reader in readers.items()}
        return {f"{name}_{metric}": value for name, own in read.items() for metric, value in own.items()}

    def _measurements(
        self, images: Sequence[Image.Image], features: Tensor, data: BriefedPosters, exchange: Exchange
    ) -> dict[str, float]:
        distances = {name.removeprefix(PREFIX): value for name, value in self._distances(features, exchange).items()}
        return {**distances, **self._read_by_all(images, data, exchange)}

    def _of_real_posters(self, data: BriefedPosters, exchange: Exchange) -> tuple[dict[str, float], Mapping[str, Any]]:
        """Return what the readers measure of real posters, which shows their errors, and the floors of distances."""

        def posters(numbers: Sequence[int]) -> list[Image.Image]:
            self.context.poll()
            return [to_pil(item["pixel_values"]) for item in conditions_of(data, numbers)]

        images = exchange.map(posters, min(len(data), self._report_count), READ_AT_A_TIME)
        features = self._measure_real_images(exchange)
        real, floor = {"diversity": diversity(features)}, self._floor
        if self._report_count != self.config.evaluation_images:
            floor = measure_floor(features, self._report_count, exchange=exchange)
        if "kid" in floor:
            real |= {"kid": floor["kid"]["mean"], "kid_standard_error": floor["kid"]["std"]}
        return {**real, **self._read_by_all(images, data, exchange)}, floor

    def _report_data(self) -> BriefedPosters:
        config = self.config
        if config.report_split not in load_all_splits(config):
            logger.info("--report_split %s: the dataset does not have it; held-out posters", config.report_split)
            return self.shown_data
        return BriefedPosters(load_split(config, config.report_split, config.seed), config, augment=False)

    def _facts(
        self, data: BriefedPosters, measured: Mapping[str, Mapping[str, float]], floor: Mapping[str, Any]
    ) -> dict[str, Any]:
        config = self.config
        guidance = config.evaluation_guidance_scale
        both = [{PREFIX + name: value for name, value in measured[when].items()} for when in ("before", "after")]
        return {
            "posters": self._report_count,
            "briefs": min(self._report_count, len(data)),
            "split": "held-out posters" if data is self.shown_data else config.report_split,
            "num_inference_steps": config.evaluation_inference_steps,
            "guidance_scale": config.preview_guidance_scale if guidance is None else guidance,
            "seed": config.seed,
            "extractor": self._extractor.name,
            "extractor_resolution": self._extractor.resolution,
            "real_posters": sum(map(len, self._real)),
            "posters_of_each_floor": floor.get("images"),
            "kid_change": _pair(measured["after"], "kid_change"),
            "beyond_limits": beyond_limits(both[0], both[1], config),
            "keeps_original": self._keeps_original,
        }

    def _write_report(
        self, report: Mapping[str, Any], posters: Mapping[str, Sequence[Image.Image]], data: BriefedPosters
    ) -> None:
        folder, rows = Path(self.config.output_dir), range(min(self.config.report_rows, len(data)))
        text = "\n".join([report_table(report), *report_notes(report["facts"]), ""])
        write_json(folder / REPORT_FILE, without_private(dict(report)))
        write_atomically(folder / TABLE_FILE, text)
        items = conditions_of(data, rows)
        shown = [[to_pil(items[row]["pixel_values"]), posters["before"][row], posters["after"][row]] for row in rows]
        titles = [data.brief(row).describe() for row in rows]
        save_png(comparison_grid(shown, ["real poster", "before", "after"], row_titles=titles), folder / GRID_FILE)
        logger.info("%s", f"\n{text}")
        logger.info("the report is in %s, and posters are in %s", folder / TABLE_FILE, folder / GRID_FILE)


def beyond_limits(before: Mapping[str, float], after: Mapping[str, float], config: BeforeAfterConfig) -> list[str]:
    """Return a sentence for each limit of the config that the measurements after exceed (keys as in metrics.csv)."""
    sentences = []
    kid, change, diverse = f"{PREFIX}kid", f"{PREFIX}kid_change", f"{PREFIX}diversity"
    if change in after and after[change] > kid_limit(after[f"{change}_standard_error"], config):
        sentences.append(
            f"KID rose from {before[kid]:.4g} to {after[kid]:.4g}, by {after[change]:.4g} ± "
            f"{after[f'{change}_standard_error']:.2g} (standard error of the pairs), by more than --max_kid_rise "
            f"{config.max_kid_rise:g} and --max_kid_rise_errors {config.max_kid_rise_errors:g}"
            "; lower --learning_rate, or raise --diffusion_weight"
        )
    if diverse in before and after[diverse] < (1 - config.max_diversity_fall) * before[diverse]:
        sentences.append(
            f"diversity fell from {before[diverse]:.4g} to {after[diverse]:.4g}, by more than --max_diversity_fall "
            f"{config.max_diversity_fall:g}; lower --learning_rate, or raise --diffusion_weight"
        )
    return sentences


def kid_limit(standard_error: float, config: BeforeAfterConfig) -> float:
    """Return how much KID may rise if the difference of the pairs has this standard error."""
    return max(config.max_kid_rise, config.max_kid_rise_errors * standard_error)


def report_notes(facts: Mapping[str, Any]) -> list[str]:
    """Return sentences that say how the report was measured, and which limits are exceeded."""
    floor = facts["posters_of_each_floor"]
    how = (
        f"{facts['posters']} posters before and {facts['posters']} after, for the same {facts['briefs']} briefs "
        f"({facts['split']}) and from the same noise; {facts['num_inference_steps']} steps, guidance "
        f"{facts['guidance_scale']:g}. "
        f"KID and diversity by {facts['extractor']} at {facts['extractor_resolution']} px, with "
        f"{facts['real_posters']} real posters"
    )
    of_floor = f"; the KID of real posters is their floor, mean ± SD of two sets of {floor} each." if floor else "."
    notes = [how + of_floor]
    if facts.get("kid_change") is not None:
        change, error = (1000 * value for value in facts["kid_change"])
        notes.append(f"KID × 10³ changed by {change:+.2f} ± {error:.2f} (standard error of the pairs).")
    if facts.get("keeps_original"):
        notes.append(f"{KEPT[0].upper()}{KEPT[1:]}.")
    return [*notes, *(f"Limit exceeded: {sentence}." for sentence in facts["beyond_limits"])]


def _pair(measured: Mapping[str, float], name: str) -> list[float] | None:
    """Return a value and its standard error, or None if it was not measured."""
    return [measured[name], measured[f"{name}_standard_error"]] if name in measured else None
