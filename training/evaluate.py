"""Measure a trained model: how close its images are to real ones, whether it copies, and whether it does as asked.

    accelerate launch training/evaluate.py --model runs/quickstart/latent_diffusion --num_images 256
    accelerate launch training/evaluate.py --model runs/image_caption/emoji_64 --split train
    accelerate launch training/evaluate.py --model some/pipeline --dataset_name my_images --num_images 1000
    accelerate launch training/evaluate.py --images my_generated_images --dataset_name my_images
    accelerate launch training/evaluate.py --model runs/quickstart/distilled --compare_with TEACHER

It finds out what the model is. Data and split are those of the run unless others are given. The results are printed and
written to evaluation.json in the folder of the run, into its model card and into the trackers that recorded it.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.tools.checkpoint_links import STATE_FILE
from pipelines.tools.cli import UserError, entry_point, located
from pipelines.tools.devices import get_device
from pipelines.tools.loading import find_pipeline
from pipelines.tools.private import without_private
from training.core.exchange import ALONE, Exchange
from training.core.files import read_json_object, write_atomically, write_json
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import save_png
from training.engine.launch import LaunchConfig, close_process_group_at_exit, exchange_of, start_accelerator
from training.engine.ranks import RankWatch
from training.engine.signals import Interrupted, StopSignal
from training.evaluation import captions
from training.evaluation.adherence import AdherenceConfig, measure_adherence
from training.evaluation.captions import CaptionOptions
from training.evaluation.copies import CopyOptions, copy_encoders, generate_sets, measure_copies
from training.evaluation.data import (
    EvaluationData,
    EvaluationDataConfig,
    folder_of_run,
    open_evaluation_data,
    run_settings,
)
from training.evaluation.generated import QualityConfig, generate, images_in, measure
from training.evaluation.inpainting import InpaintingConfig, measure_inpainting
from training.evaluation.sheets import sample_grid
from training.metrics.features import FeatureExtractor, open_extractor
from training.metrics.generators import ImageGenerator, SamplingConfig, generator_of
from training.publishing.card_update import update_card
from training.publishing.evaluation_facts import EVALUATION_FILE
from training.reporting.evaluations import report_evaluation
from training.reporting.tracking import parse_report_to


@dataclass
class EvaluationConfig(
    CaptionOptions, AdherenceConfig, InpaintingConfig, SamplingConfig, CopyOptions, QualityConfig, EvaluationDataConfig,
    LaunchConfig,
):  # fmt: skip
    """Flags of evaluate.py."""

    model: str = option("")
    """Model to evaluate: run folder, checkpoint, pipeline folder or Hub id"""
    models: list[str] = option([])
    """Several models to evaluate one after the other, e.g. '[runs/controlnet/add,runs/controlnet/gated]', instead of
    --model; a table compares them"""
    images: str | None = option(None)
    """Folder of images to evaluate instead of a model"""
    compare_with: str = option("")
    """Teacher of a distilled --model, which is measured in the same run, with the same captions and noise; the speed of
    both is measured as well. --num_inference_steps and --guidance_scale are then those of the teacher, as a distilled
    model has its own"""
    device: str | None = option(None)
    """Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"""
    trust_remote_code: bool = option(False)
    """Run the custom code of a pipeline whose class is not part of Halftone"""
    keep_images: str | None = option(None)
    """Folder in which the generated images are kept (PNG), for example to measure them again with --images and another
    --extractor; it must be empty or new. If unset, they are not kept"""
    grid: str | None = option(None)
    """File for a grid of real images beside generated ones (PNG); if unset, no grid is written"""
    grid_rows: int = option(8, at_least=1)
    """Number of rows of the grid"""
    output: str | None = option(None)
    """File for the results (JSON); if unset, evaluation.json in the folder of the run"""
    report_to: str | list[str] | None = option(None)
    """Trackers with the run of the model, whose summary there gets the metrics: wandb, trackio, tensorboard, several of
    them (comma-separated), all or none; if unset, those that recorded the run"""
    table: str | None = option(None)
    """File for the table of --models (Markdown); if unset, it is only printed"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if sum(map(bool, (self.model, self.models, self.images))) != 1:
            raise UserError(
                "give one of --model (a run, a checkpoint or a pipeline), --models (a list of them) and --images (a "
                "folder)"
            )
        if self.models and (self.output or self.grid or self.copies_sheet or self.keep_images):
            raise UserError(
                "--output, --grid, --copies_sheet and --keep_images are for a single --model; use --table with --models"
            )
        if self.compare_with and not self.model:
            raise UserError("--compare_with needs --model, with a model that was distilled from it")
        if self.keep_images and self.images:
            raise UserError("--keep_images is for images that a --model generates, and --images are kept already")
        kept = Path(self.keep_images) if self.keep_images else None
        if kept and kept.exists() and (not kept.is_dir() or any(kept.iterdir())):
            raise UserError(f"--keep_images {located(kept)} is not an empty folder; give a new folder, or empty it")
        parse_report_to(self.report_to)
        if self.images and not self.dataset_name:
            raise UserError("--images needs --dataset_name, with the real images to compare with")

    @property
    def output_file(self) -> Path | None:
        """The file for the results; None for a model outside of a run."""
        if self.output:
            return Path(self.output)
        run = folder_of_run(self.model)
        return run / EVALUATION_FILE if run else None


def evaluate(
    config: EvaluationConfig, exchange: Exchange = ALONE, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Evaluate a model or a folder of images; with several processes, every one of them calls this.

    Args:
        settings: the settings of a run whose data are used; None for those of the model's run.

    Returns:
        What was evaluated and how, `metrics`, `floor` (real images against real images), `copies` and `verdict`.

    Raises:
        UserError: the model or the data do not exist, or the model generates nothing that can be measured.
    """
    settings = run_settings(config.model) if settings is None else settings
    extractor = open_extractor(config.extractor, config.extractor_resolution, get_device(config.device))
    generator = None if config.images else _generator(config)
    config.check_filling(generator)
    data = open_evaluation_data(config, settings, generator, exchange)
    if generator is None:
        images = images_in(str(config.images), config.num_images)
    else:
        started = time.perf_counter()
        images = generate(generator, data, config, exchange)
        seconds = time.perf_counter() - started
    results = _facts(config, generator, data, extractor, len(images))
    results |= {"images_per_second": len(images) / seconds} if generator is not None else {}
    results |= measure(images, data.splits, extractor, exchange)
    sets = generate_sets(generator, images, data, config, config.batch_size, exchange)
    if generator is not None:
        adherence = measure_adherence(generator, images, data, config, config.device, exchange)
        if captions.is_captioner(generator.pipeline):
            adherence |= captions.measure_captions(generator.pipeline, settings, config, exchange)
        if config.inpaint_images:
            made = measure_inpainting(generator, images, data, extractor, config, config.batch_size, exchange)
            adherence |= made[0]
            results["real"] |= made[1]
        results["metrics"] |= adherence
    exchange.on_main(lambda: _save_images(config, generator, images, data))
    if sets is not None:
        spaces = copy_encoders(config.copy_spaces, generator, extractor)
        file = config.output_file
        sheet = str(file.with_name("copies.png")) if file is not None else None
        results |= measure_copies(sets, data, spaces, config.copies_sheet, sheet, exchange)
    return results


def _save_images(
    config: EvaluationConfig, generator: ImageGenerator | None, images: Sequence[Image.Image], data: EvaluationData
) -> None:
    if config.grid:
        save_png(sample_grid(generator, images, data, config.grid_rows), config.grid)
    if config.keep_images:
        for number, image in enumerate(images):
            save_png(image, Path(config.keep_images) / f"{number:05d}.png")


def _generator(config: EvaluationConfig) -> ImageGenerator:
    from pipelines.tools.loading import load_on_device

    pipeline = load_on_device(config.model, config.device, trust_remote_code=config.trust_remote_code)
    if config.compare_with:
        if not pipeline.config.get("distilled"):
            raise UserError(
                f"--compare_with is for a model that was distilled, but --model {config.model} was not; use --models "
                "'[A, B]' to compare other models"
            )
        config = dataclasses.replace(config, num_inference_steps=None, guidance_scale=None)
    return generator_of(pipeline, config)


def _facts(
    config: EvaluationConfig,
    generator: ImageGenerator | None,
    data: EvaluationData,
    extractor: FeatureExtractor,
    count: int,
) -> dict[str, Any]:
    splits = {name: len(split) for name, split in data.splits.items()}
    return {
        "model": config.model or config.images,
        "kind": generator.kind if generator else "folder of images",
        "dataset": data.source,
        "split": config.split,
        "num_images": count,
        "real_images": splits,
        "resolution": data.conditions.config.resolution,
        "extractor": {
            "name": extractor.name,
            "fingerprint": extractor.fingerprint,
            "resolution": extractor.resolution,
        },
        "sampling": generator.facts() if generator else None,
        **(_step(config.model) if config.model else {}),
    }


def _step(model: str) -> dict[str, int]:
    """Return the number of steps that a model was trained for, if its folder says so."""
    folder = find_pipeline(model).parent
    for file in (STATE_FILE, "record.json"):
        content = read_json_object(folder / file) or {}
        step = content.get("step", content.get("steps"))
        if isinstance(step, int):
            return {"step": step}
    return {}


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(EvaluationConfig, argv, description=__doc__)
    get_device(config.device)
    accelerator = start_accelerator(config)
    exchange = exchange_of(accelerator, stops_together=False)
    with StopSignal() as stop:
        try:
            ranks = (exchange.rank, exchange.num_processes)
            with RankWatch(*ranks, stop, patience=config.process_timeout), stop.at_once():
                _evaluate_all(config, exchange)
                accelerator.wait_for_everyone()
        except Interrupted:
            return stop.exit_status(stop.requested or signal.SIGTERM)
    close_process_group_at_exit()
    return 0


def _evaluate_all(config: EvaluationConfig, exchange: Exchange) -> None:
    if config.compare_with:
        _compare_with_teacher(config, exchange)
        return
    compared: dict[str, dict[str, Any]] = {}
    for model in config.models or [config.model]:
        one = dataclasses.replace(config, model=model, models=[])
        results = evaluate(one, exchange)
        compared[model] = results["metrics"]
        if exchange.is_main:
            print("\n".join(summary(results)))
            _save(one, results)
    if config.models and exchange.is_main:
        print(f"\n{comparison_table(compared)}", end="")
        if config.table:
            write_atomically(config.table, without_private(comparison_table(compared)))


def _compare_with_teacher(config: EvaluationConfig, exchange: Exchange) -> None:
    """Evaluate a distilled model and its teacher on the same captions, with the same noise, and print both."""
    results = evaluate(config, exchange)
    own_files: dict[str, Any] = {"compare_with": "", "keep_images": None, "grid": None, "copies_sheet": None}
    teacher = dataclasses.replace(config, model=config.compare_with, **own_files)
    others = evaluate(teacher, exchange, run_settings(config.model))
    if not exchange.is_main:
        return
    for one in (results, others):
        print("\n".join(summary(one)), end="\n\n")
    speeds = [{"images_per_second": one["images_per_second"]} for one in (results, others)]
    both = {one["model"]: speed | one["metrics"] for speed, one in zip(speeds, (results, others), strict=True)}
    print(comparison_table(both), end="")
    if config.table:
        write_atomically(config.table, without_private(comparison_table(both)))
    facts = ("model", "sampling", "images_per_second", "metrics")
    _save(config, {**results, "compared_with": {name: others[name] for name in facts}})
    print("\n" + compared_in_words(results, others))


def compared_in_words(results: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Return in a sentence how close a distilled model is to its teacher, and how much faster."""
    own, its = (one["images_per_second"] for one in (results, others))
    text = f"{own:.3g} images/s against {its:.3g} of the teacher ({own / its:.1f} times as fast)"
    kids = [one["metrics"].get("kid") for one in (results, others)]
    if None not in kids and kids[1] > 0:
        text += f"; KID {kids[0]:.4g} against {kids[1]:.4g} ({kids[0] / kids[1] - 1:+.1%})"
    return text


def _save(config: EvaluationConfig, results: dict[str, Any]) -> None:
    if config.output_file is None:
        return
    write_json(config.output_file, without_private(results))
    print(f"\n{config.output_file}")
    run = folder_of_run(config.model)
    if run is not None and not config.output:
        update_card(run)
        report_evaluation(run, results, config.report_to)


def comparison_table(compared: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each metric and a column for each model."""
    names = dict.fromkeys(name for metrics in compared.values() for name in metrics)
    lines = [["", *compared], ["---", *["---:"] * len(compared)]]
    for name in names:
        lines.append([name, *(_cell(metrics.get(name)) for metrics in compared.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value or "")


def summary(results: dict[str, Any]) -> list[str]:
    """Return the results as lines of text: what was measured, each metric with its floor, and the verdict."""
    sampling, extractor, floor = results["sampling"] or {}, results["extractor"], results["floor"]
    how = ", ".join(f"{name} {value}" for name, value in sampling.items() if value is not None)
    real = " and ".join(f"{count:,} of {name}" for name, count in results["real_images"].items())
    lines = [
        f"{results['model']} ({results['kind']}): {results['num_images']:,} images; {how}",
        f"compared with {real} of {results['dataset']} at {results['resolution']} pixels; features of "
        f"{extractor['name']} at {extractor['resolution']} pixels",
        "",
        f"{'':28}{'generated':>14}   real against real, {floor['images']:,} each (mean ± SD)",
    ]
    for name, value in results["metrics"].items():
        if not isinstance(value, (int, float)):
            lines.append(f"{name:28}{value}")
            continue
        known = floor.get(name)
        other = f"{known['mean']:.5g} ± {known['std']:.2g}" if known else ""
        if not known and name in results["real"]:
            other = f"{results['real'][name]:.5g}"
        lines.append(f"{name:28}{value:14.5g}   {other}".rstrip())
    lines += [f"{name:28}not computed: {why}" for name, why in results["refused"].items()]
    return lines + _copy_lines(results)


def _copy_lines(results: Mapping[str, Any]) -> list[str]:
    lines = [results[name] for name in ("verdict", "replay_verdict") if name in results]
    if invented := results.get("invented"):
        known = f"{invented['known_captions']:.1%} of their captions are captions of training images"
        lines.append(f"invented pairs: {invented['verdict']}; {known}")
    return ["", *lines] if lines else []


if __name__ == "__main__":
    entry_point(main)
