"""Compares several runs: a table of the settings that differ and of the results, and a row of samples from each run."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tools.checkpoint_links import STATE_FILE, follow_links
from pipelines.tools.files import open_image_file
from pipelines.tools.grids import PAPER, image_grid
from training.core.files import read_json_object, write_atomically
from training.core.previews import save_png
from training.engine.run_config import RunConfig
from training.experiments.registry import config_class, stage_class
from training.run.folder import RunFolder
from training.run.metrics_log import read_metrics

if TYPE_CHECKING:
    from PIL.Image import Image

# Name → (stage, run folder, requested config).
Runs = Mapping[str, tuple[str, RunFolder, RunConfig]]
# Runs that differ in one of these settings compute different losses, which cannot be compared.
MEANING_OF_LOSS = (
    "prediction_type", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "rescale_betas_zero_snr",
    "flow_shift", "snr_gamma", "noise_offset", "vae", "latent_cache", "resolution", "dataset_name", "train_data_dir",
)  # fmt: skip
NAME = "comparison"
DRAWN_FROM_NOISE = ("LatentDiffusionPipeline", "PosterDecoderPipeline")


@dataclass
class Samples:
    """The samples in each row of the image."""

    prompts: Sequence[str] | None
    """None uses the preview prompts of the first run that has any."""
    count: int
    seed: int
    """Random seed of the first column; later columns add 1 each."""


@dataclass
class Table:
    """Rows of values by column, the columns in order, and which of the columns are settings that differ."""

    columns: list[str]
    rows: list[dict[str, Any]]
    differing: list[str]


def comparison_table(runs: Runs, outcomes: Mapping[str, str]) -> Table:
    """Return a table with one row per run: the settings that differ between the configs, and the metrics of the run.

    Args:
        outcomes: name → a few words on how the run ended.
    """
    settings = {name: _settings(stage, folder, config) for name, (stage, folder, config) in runs.items()}
    differing = differing_settings(list(settings.values()))
    rows = []
    for name, (stage, folder, _) in runs.items():
        row = {"name": name, "outcome": outcomes.get(name, ""), **{key: settings[name].get(key) for key in differing}}
        rows.append(row | run_metrics(stage, folder))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    first = ["name", "outcome", *differing, "parameters", "steps"]
    last = ["images_per_second", "training_seconds", "peak_memory_mib"]
    middle = [key for key in columns if key not in (*first, *last)]
    return Table([key for key in [*first, *middle, *last] if key in columns], rows, differing)


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ between the configs, in the order of the configs."""
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({repr(values.get(key)) for values in settings}) > 1]


def run_metrics(stage: str, folder: RunFolder) -> dict[str, Any]:
    """Return the metrics that a run has recorded so far; empty for a run that has not saved a checkpoint yet.

    `best_<metric>` and `best_step` refer to the metric by which the stage selects its best checkpoint; all other
    metrics are the latest ones. `images_per_second` is measured over all training steps, without validation and saving.
    """
    state = _read_json(follow_links(folder.checkpoints / "latest") / STATE_FILE)
    record = _read_json(folder.record_file)
    if not state:
        return {}
    metrics = read_metrics(folder.metrics_file) if folder.metrics_file.is_file() else []
    last = {key: float(row[key]) for row in metrics for key in row if key.startswith(("val_", "eval_")) and row[key]}
    recorded: dict[str, Any] = {"parameters": record.get("trained_parameters"), "steps": state["step"], **last}
    if state.get("best_value") is not None:
        recorded |= {
            f"best_{state.get('best_metric') or stage_class(stage).best_metric}": state["best_value"],
            "best_step": state["best_step"],
        }
    if state["elapsed_seconds"] > 0:
        recorded["images_per_second"] = round(state["images_seen"] / state["elapsed_seconds"], 2)
    recorded["training_seconds"] = round(state["elapsed_seconds"], 1)
    recorded["peak_memory_mib"] = record.get("peak_memory_mib")
    return {key: value for key, value in recorded.items() if value is not None}


def draw_samples(runs: Runs, samples: Samples, poll: Callable[[], None] = lambda: None) -> Image | None:
    """Generate a row of images for each run that has a pipeline, from the same seeds and conditions.

    A run whose pipeline needs other inputs, or does not sample from noise, shows its previews instead, below the rows
    of the other runs.

    Args:
        poll: called between runs.

    Returns:
        The rows as one image; None if no run has anything to show.
    """
    exported = {name: run for name, run in runs.items() if (run[1].pipeline / "model_index.json").is_file()}
    if not exported:
        return None
    drawn = {name: run for name, run in exported.items() if _pipeline_class(run[1]) in DRAWN_FROM_NOISE}
    sheets = [_rows_of(drawn, samples, poll)] if drawn else []
    for name, (_, folder, _) in exported.items():
        file = folder.pipeline / "samples.png"
        if name not in drawn and file.is_file():
            sheets.append(image_grid([_opened(file)], columns=1, row_titles=[name]))
    return _stacked(sheets) if sheets else None


def _rows_of(runs: Runs, samples: Samples, poll: Callable[[], None]) -> Image:
    first = next(iter(runs.values()))[2]
    prompts = _prompts(runs, samples)
    images: list[Image] = []
    titles: list[str] = []
    for _, folder, _ in runs.values():
        poll()
        row, titles = _draw(folder, first, prompts, samples)
        images += row
    return image_grid(images, columns=samples.count, row_titles=list(runs), column_titles=titles)


def write_comparison(
    folder: Path, table: Table, image: Image | None, seeds: tuple[str, str] | None = None
) -> list[Path]:
    """Write comparison.csv, comparison.md and, if there is an image, comparison.png; returns the paths.

    Args:
        seeds: the metrics over several seeds, as Markdown, which is placed above the table of all runs, and as CSV,
            which becomes comparison_seeds.csv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{NAME}.csv", folder / f"{NAME}.md"]
    write_atomically(written[0], table_csv(table))
    if seeds is not None:
        written.append(folder / f"{NAME}_seeds.csv")
        write_atomically(written[-1], seeds[1])
    image_file = folder / f"{NAME}.png"
    if image is not None:
        written.append(save_png(image, image_file))
    write_atomically(
        written[1], table_markdown(table, image_file.name if image_file.is_file() else None, seeds and seeds[0])
    )
    return written


def table_csv(table: Table) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, table.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return buffer.getvalue()


def table_markdown(table: Table, image_name: str | None, summary: str | None = None) -> str:
    cells = [[cell(row.get(column)) for column in table.columns] for row in table.rows]
    above = ["## Over seeds", "", summary.rstrip(), "", "## Runs", ""] if summary else []
    header = [f"| {' | '.join(table.columns)} |", f"|{'---|' * len(table.columns)}"]
    lines = ["# Comparison", "", *above, *header]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    reasons = [key for key in table.differing if key in MEANING_OF_LOSS]
    if reasons and any("loss" in column for column in table.columns):
        differing = ", ".join(reasons)
        warning = f"Losses cannot be compared between rows that differ in {differing}; compare the samples instead."
        lines += ["", warning]
    if image_name:
        lines += ["", "One row of samples per run, from the same seeds and prompts:", "", f"![samples]({image_name})"]
    return "\n".join(lines) + "\n"


def _settings(stage: str, folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Return the settings that define a run, by dotted name: those it was started with, or else the requested ones."""
    free = {f.name for f in dataclasses.fields(config_class(stage)) if f.metadata.get("on_resume") == "free"}
    values = folder.saved_config() or config.to_dict()
    return _flat({name: value for name, value in values.items() if name not in free})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _prompts(runs: Runs, samples: Samples) -> list[str]:
    """Return one prompt per column; none for models without a text encoder."""
    if not any((folder.pipeline / "tokenizer").is_dir() for _, folder, _ in runs.values()):
        return []
    prompts = list(samples.prompts or [])
    for _, folder, config in runs.values():
        # With class labels, the caption of a preview ends with the class in brackets.
        recorded = [re.sub(r" \[[^\]]*\]$", "", text) for text in _read_json(folder.record_file).get("prompts") or []]
        prompts = prompts or list(getattr(config, "preview_prompts", None) or recorded)
    prompts = prompts or [""]
    return [prompts[i % len(prompts)] for i in range(samples.count)]


def _draw(
    folder: RunFolder, settings: RunConfig, prompts: Sequence[str], samples: Samples
) -> tuple[list[Image], list[str]]:
    """Generate the images of one row; column i uses seed + i.

    Args:
        settings: config whose guidance scale and number of sampling steps are used for all rows.

    Returns:
        The images, and the titles of their columns.
    """
    import torch

    from pipelines.tools.loading import load_on_device

    pipeline = load_on_device(folder.pipeline, None)
    pipeline.set_progress_bar_config(disable=True)
    seeds = range(samples.seed, samples.seed + samples.count)
    arguments, titles = _conditions(pipeline, prompts, seeds)
    images = pipeline(
        **arguments,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        guidance_scale=getattr(settings, "preview_guidance_scale", 2.0),
        num_inference_steps=getattr(settings, "preview_inference_steps", 25),
    ).images
    return images, titles


def _conditions(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """Return the pipeline's arguments with the conditions of all columns, and the title of each column."""
    from pipelines.common.design_brief import DesignBrief

    if hasattr(pipeline, "brief_encoder"):
        briefs = [DesignBrief.random(seed) for seed in seeds]
        return {"briefs": briefs}, [brief.describe() for brief in briefs]
    arguments: dict[str, Any] = {}
    titles = [f"seed {seed}" for seed in seeds]
    if pipeline.tokenizer is not None:
        arguments["prompt"] = titles = list(prompts)
    if names := pipeline.config.get("id2label"):
        named = [names[str(i % len(names))] for i in range(len(seeds))]
        arguments["class_labels"] = named
        titles = [f"{title} [{name}]" for title, name in zip(titles, named)] if "prompt" in arguments else named
    return arguments or {"num_images_per_prompt": len(seeds)}, titles


def _opened(file: Path) -> Image:
    return open_image_file(file)


def _stacked(sheets: Sequence[Image]) -> Image:
    """Stack images vertically on a white background."""
    from PIL import Image as PILImage

    whole = PILImage.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _pipeline_class(folder: RunFolder) -> str:
    name = _read_json(folder.pipeline / "model_index.json").get("_class_name")
    return name[1] if isinstance(name, list) else str(name)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) or {}


def cell(value: Any) -> str:
    """Return a value as it is written into a table of Markdown."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|")
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
