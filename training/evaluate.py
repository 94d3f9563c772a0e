"""Measure a trained model: how close its images are to real ones, whether it copies, and whether it does as asked.

    accelerate launch training/evaluate.py --model runs/quickstart/latent_diffusion --num_images 256
    accelerate launch training/evaluate.py --model runs/image_caption/emoji_64 --split train
    accelerate launch training/evaluate.py --model some/pipeline --dataset_name my_images --num_images 1000
    accelerate launch training/evaluate.py --images my_generated_images --dataset_name my_images

It finds out what the model is. Data and split are those of the run unless others are given. The results are printed and
written to evaluation.json in the folder of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.tools.checkpoint_links import STATE_FILE
from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.devices import get_device
from pipelines.tools.grids import comparison_grid
from pipelines.tools.loading import find_pipeline
from training.core.exchange import Exchange
from training.core.files import read_json_object, write_atomically, write_json
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import save_png
from training.engine.launch import LaunchConfig, start_accelerator
from training.engine.validation import gather
from training.evaluation import captions
from training.evaluation.adherence import AdherenceConfig, measure_adherence, pixels_of
from training.evaluation.captions import CaptionOptions
from training.evaluation.data import (
    EvaluationData,
    EvaluationDataConfig,
    RealImages,
    open_evaluation_data,
    run_settings,
)
from training.evaluation.generated import (
    Generated,
    QualityConfig,
    find_copies,
    generate,
    held_out_images,
    images_in,
    measure,
)
from training.metrics.features import FeatureExtractor, open_extractor
from training.metrics.generators import ImageGenerator, SamplingConfig, generator_of, native_resolution
from training.metrics.images import to_pil
from training.metrics.memorization import Similarity, contact_sheet, verdict
from training.publishing.card_update import update_card
from training.publishing.evaluation_facts import EVALUATION_FILE

GRID_SAMPLES = 3
VARIANT_SEEDS = 1_000_000


@dataclass
class EvaluationConfig(
    CaptionOptions, AdherenceConfig, SamplingConfig, QualityConfig, EvaluationDataConfig, LaunchConfig
):
    """Flags of evaluate.py."""

    model: str = option("")
    """Model to evaluate: run folder, checkpoint, pipeline folder or Hub id"""
    models: list[str] = option([])
    """Several models to evaluate one after the other, e.g. '[runs/controlnet/add,runs/controlnet/gated]', instead of
    --model; a table compares them"""
    images: str | None = option(None)
    """Folder of images to evaluate instead of a model"""
    device: str | None = option(None)
    """Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"""
    trust_remote_code: bool = option(False)
    """Run the custom code of a pipeline whose class is not part of Halftone"""
    grid: str | None = option(None)
    """File for a grid of real images beside generated ones (PNG); if unset, no grid is written"""
    grid_rows: int = option(8, at_least=1)
    """Number of rows of the grid"""
    copies_sheet: str | None = option(None)
    """File with the generated images that are closest to training images (PNG); if unset, copies.png beside
    the results if anything looks like a copy"""
    output: str | None = option(None)
    """File for the results (JSON); if unset, evaluation.json in the folder of the run"""
    table: str | None = option(None)
    """File for the table of --models (Markdown); if unset, it is only printed"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if sum(map(bool, (self.model, self.models, self.images))) != 1:
            raise UserError(
                "give one of --model (a run, a checkpoint or a pipeline), --models (a list of them) and --images (a "
                "folder)"
            )
        if self.models and (self.output or self.grid or self.copies_sheet):
            raise UserError("--output, --grid and --copies_sheet are for a single --model; use --table with --models")
        if self.images and not self.dataset_name:
            raise UserError("--images needs --dataset_name, with the real images to compare with")

    @property
    def run(self) -> Path | None:
        """The folder of the run that the model belongs to; None for a model outside of a complete run."""
        path = Path(self.model).expanduser()
        folders = [path, *path.parents[:4]] if self.model and path.exists() else []
        return next((folder for folder in folders if (folder / "record.json").is_file()), None)

    @property
    def output_file(self) -> Path | None:
        """The file for the results; None for a model outside of a run."""
        if self.output:
            return Path(self.output)
        return self.run / EVALUATION_FILE if self.run else None


def evaluate(config: EvaluationConfig, exchange: Exchange | None = None) -> dict[str, Any]:
    """Evaluate a model or a folder of images; with several processes, every one of them calls this.

    Returns:
        What was evaluated and how, `metrics`, `floor` (real images against real images), `copies` and `verdict`.

    Raises:
        UserError: the model or the data do not exist, or the model generates nothing that can be measured.
    """
    exchange = exchange or Exchange()
    settings = run_settings(config.model) if config.model else {}
    extractor = open_extractor(config.extractor, config.extractor_resolution, get_device(config.device))
    generator = None if config.images else _generator(config)
    resolution = native_resolution(generator.pipeline) if generator else None
    data = open_evaluation_data(config, settings, generator or _Nothing(), resolution)
    generated = (
        generate(generator, data, config, exchange)
        if generator
        else Generated(images_in(str(config.images), config.num_images), [])
    )
    results = _facts(config, generator, data, extractor, len(generated.images))
    results |= _step(config.model) if config.model else {}
    results |= measure(generated.images, data.splits, extractor, exchange)
    if not exchange.is_main:
        return results
    if generator is not None:
        results["metrics"] |= measure_adherence(generator, generated, data, config, config.device)
        if captions.is_captioner(generator.pipeline):
            results["metrics"] |= captions.measure_captions(generator.pipeline, settings, config)
    if config.copy_spaces and data.training is not None and not (generator and generator.takes_images):
        available = {"features": lambda images: extractor(images)} | _latent_space(generator)
        spaces = {name: available[name] for name in config.copy_spaces if name in available}
        similar = find_copies(generated.images, data.training, held_out_images(data.splits), spaces)
        results["copies"] = [one.report.to_json() for one in similar]
        results["verdict"] = verdict(one.report for one in similar)
        _draw_closest(similar[0], generated, data.training, config)
    if config.grid:
        save_png(_grid(generator, generated, data, config), config.grid)
    return results


class _Nothing(ImageGenerator):
    """Stands for the unknown origin of a folder of images."""

    kind = "folder of images"

    def __init__(self) -> None:
        pass


def _generator(config: EvaluationConfig) -> ImageGenerator:
    from pipelines.tools.loading import load_on_device

    pipeline = load_on_device(config.model, config.device, trust_remote_code=config.trust_remote_code)
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


def _latent_space(generator: ImageGenerator | None) -> dict[str, Callable[[Sequence[Image.Image]], Tensor]]:
    """Return a function from images to the latents of the model's VAE, if it has one."""
    vae = getattr(getattr(generator, "pipeline", None), "vae", None)
    if vae is None:
        return {}

    @torch.inference_mode()
    def encode(images: Sequence[Image.Image]) -> Tensor:
        parts = []
        for start in range(0, len(images), 16):
            latents = vae.encode(pixels_of(images[start : start + 16]).to(vae.device, vae.dtype))
            mode = latents.latent_dist.mode() if hasattr(latents, "latent_dist") else latents.latents
            parts.append(mode.flatten(1).float().cpu())
        return torch.cat(parts)

    return {"latents": encode}


def _draw_closest(similarity: Similarity, generated: Generated, training: RealImages, config: EvaluationConfig) -> None:
    path = config.copies_sheet
    if path is None and similarity.report.copies and config.output_file is not None:
        path = str(config.output_file.with_name("copies.png"))
    if path:
        save_png(contact_sheet(similarity, generated.images, lambda row: training.images([row])[0]), path)


def _grid(
    generator: ImageGenerator | None, generated: Generated, data: EvaluationData, config: EvaluationConfig
) -> Image.Image:
    """Draw real images beside generated ones: a row of the data in each row, with further samples if it has some."""
    if generator is None:
        split = next(iter(data.splits.values()))
        real = split.images(range(min(config.grid_rows, len(split))))
        return comparison_grid([list(pair) for pair in zip(real, generated.images)], ["real image", "generated"])
    rows = min(len(generated.items), len(data.conditions))
    shown = range(rows)[:: max(1, rows // config.grid_rows)][: config.grid_rows]
    items = [generated.items[number] for number in shown]
    columns = [[to_pil(item["pixel_values"]) for item in items], [generated.images[number] for number in shown]]
    if generator.samples:
        for variant in range(1, GRID_SAMPLES):
            numbers = [number + variant * VARIANT_SEEDS for number in shown]
            columns.append(generator(items, numbers))
    titles = ["real image", *["generated"] * (len(columns) - 1)]
    words = [str(item.get("caption", "")) for item in items]
    return comparison_grid([list(row) for row in zip(*columns)], titles, row_titles=words if any(words) else None)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(EvaluationConfig, argv, description=__doc__)
    get_device(config.device)
    accelerator = start_accelerator(config)
    exchange = Exchange(accelerator.process_index, accelerator.num_processes, lambda value: gather(accelerator, value))
    compared: dict[str, dict[str, Any]] = {}
    for model in config.models or [config.model]:
        one = dataclasses.replace(config, model=model, models=[])
        results = evaluate(one, exchange)
        if exchange.is_main:
            print("\n".join(summary(results)))
            if one.output_file is not None:
                write_json(one.output_file, results)
                print(f"\n{one.output_file}")
                if one.run is not None and not one.output:
                    update_card(one.run)
            compared[model] = results["metrics"]
    if config.models and exchange.is_main:
        print(f"\n{comparison_table(compared)}", end="")
        if config.table:
            write_atomically(config.table, comparison_table(compared))


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
    if "verdict" in results:
        lines += ["", results["verdict"]]
    return lines


if __name__ == "__main__":
    entry_point(main)
