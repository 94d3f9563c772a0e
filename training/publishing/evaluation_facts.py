"""What a model card says about evaluation.json, and the results that the Hub shows from it.

evaluation.json is written by training/evaluate.py. A key that it lacks is left out of the card.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.core.files import read_json_object
from training.publishing.public import cell, clean, folder_name, literal, public_value

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

EVALUATION_FILE = "evaluation.json"
METRIC_NAMES = {
    "val_loss": "validation loss",
    "val_psnr": "PSNR on validation images (dB)",
    "val_ssim": "SSIM on validation images",
    "val_pixel_accuracy": "pixel accuracy of segmentation on validation images",
    "val_mean_iou": "mean IoU of segmentation on validation images",
    "val_top1_accuracy": "top-1 accuracy of classification on validation images",
    "fid": "FID",
    "fd": "Fréchet distance (lower is better)",
    "kid": "KID (lower is better)",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "diversity": "diversity (mean pairwise distance)",
    "color_difference": "difference of the colours (lower is better)",
}
STANDARD_ERROR = "_standard_error"


def read_evaluation(run: Path, steps: Any, *, just_made: bool = False) -> dict[str, Any] | None:
    """Return evaluation.json of a run folder if it belongs to the model after `steps` steps; None otherwise.

    Args:
        just_made: the model has not been exported since, so that an evaluation without a step belongs to it.
    """
    evaluation = read_json_object(run / EVALUATION_FILE)
    if evaluation is None or not isinstance(evaluation.get("metrics"), Mapping):
        return None
    step = evaluation.get("step")
    return evaluation if step == steps or (step is None and just_made) else None


def evaluation_facts(evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the variables of the template about an evaluation; empty without one."""
    if not evaluation:
        return {}
    return {
        "how": list(_how(evaluation)),
        "has_floor": bool(_mapping(evaluation, "floor")),
        "floor_images": shown(_mapping(evaluation, "floor").get("images") or ""),
        "rows": [
            (metric_cell(name), _with_error(evaluation, name, value), _real(evaluation, name))
            for name, value in evaluation["metrics"].items()
            if value is not None and not name.endswith(STANDARD_ERROR)
        ],
        "refused": [(metric_cell(name), cell(why)) for name, why in _mapping(evaluation, "refused").items()],
        "verdict": literal(str(evaluation.get("verdict") or "").split(":")[0]),
        "copies": [_copies(report) for report in _reports(evaluation, "copies")],
        "replay": [_replay(report) for report in _reports(evaluation, "replay")],
        "invented": [_copies(report) for report in _reports(_mapping(evaluation, "invented"), "copies")],
        "known_captions": percent(_mapping(evaluation, "invented").get("known_captions")),
    }


def _how(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (what, value) of everything that the metrics depend on."""
    if evaluation.get("num_images"):
        yield "images of the model (n)", shown(evaluation["num_images"])
    real = [f"{number(count)} of {clean(name)}" for name, count in _mapping(evaluation, "real_images").items()]
    data = _dataset(evaluation)
    if data or real:
        split = evaluation.get("split")
        splits = " and ".join(map(str, split)) if isinstance(split, list) else split
        parts = [data, f"split {clean(splits)}" if splits and not real else "", " and ".join(real)]
        yield "real images", literal(", ".join(filter(None, parts)))
    if evaluation.get("resolution"):
        yield "resolution in pixels", literal(evaluation["resolution"])
    extractor = _mapping(evaluation, "extractor")
    if extractor.get("name"):
        resolution = f" at {extractor['resolution']} pixels" if extractor.get("resolution") else ""
        print_ = f", fingerprint {str(extractor['fingerprint'])[:16]}" if extractor.get("fingerprint") else ""
        yield "feature extractor", literal(f"{folder_name(str(extractor['name']))}{resolution}{print_}")
    sampling = [f"{n.replace('_', ' ')} {v}" for n, v in _mapping(evaluation, "sampling").items() if v is not None]
    if sampling:
        yield "sampling", literal(", ".join(sampling))


def _real(evaluation: Mapping[str, Any], name: str) -> str:
    """Return the value of real images: the floor as mean ± SD, or what was measured on them."""
    floor = _mapping(evaluation, "floor").get(name)
    if isinstance(floor, Mapping) and floor.get("mean") is not None:
        spread = f" ± {shown(floor['std'])}" if floor.get("std") is not None else ""
        return shown(floor["mean"]) + spread
    real = _mapping(evaluation, "real").get(name)
    return shown(real) if real is not None else ""


def _with_error(evaluation: Mapping[str, Any], name: str, value: Any) -> str:
    error = evaluation["metrics"].get(f"{name}{STANDARD_ERROR}")
    return shown(value) + (f" (standard error {shown(error)})" if error is not None else "")


def _reports(source: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [report for report in source.get(name) or [] if isinstance(report, Mapping)]


def _copies(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row about copies in one space."""
    counts = [shown(report.get(name, "")) for name in ("num_images", "copies", "exact_copies")]
    compared = [shown(report.get(name, "")) for name in ("num_training", "num_held_out")]
    rate = _rate(report, "copy_rate")
    return (shown(report.get("space", "")), *counts, rate, percent(report.get("false_positive_rate")), *compared)


def _replay(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row about what the model returns for the captions of training images, in one space."""
    counts = [shown(report.get(name, "")) for name in ("num_images", "returned", "nearest")]
    return (shown(report.get("space", "")), *counts, _rate(report, "rate"), percent(report.get("false_positive_rate")))


def _rate(report: Mapping[str, Any], name: str) -> str:
    """Return a rate with its interval."""
    interval = [percent(report.get(end)) for end in ("lowest_rate", "highest_rate")]
    return percent(report.get(name)) + (f" ({interval[0]} to {interval[1]})" if all(interval) else "")


def evaluation_results(record: Mapping[str, Any], evaluation: Mapping[str, Any] | None, task: str) -> list[EvalResult]:
    """Return the metrics of the evaluation and of the last validation in the form of the Hub.

    Args:
        task: a task of the Hub, such as text-to-image.
    """
    from huggingface_hub import EvalResult

    results = []
    for source in (evaluation, {**record, "split": "validation", "num_images": record.get("num_validation_images")}):
        if not source or not isinstance(source.get("metrics"), Mapping):
            continue
        name = _dataset(source) or "not named"
        shared: dict[str, Any] = {
            "task_type": task,
            "dataset_type": re.sub(r"[^\w./-]+", "-", name).strip("-") or "unknown",
            "dataset_name": name,
            "dataset_split": clean(source["split"]) if isinstance(source.get("split"), str) else None,
        }
        for metric, value in source["metrics"].items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            if metric.endswith(STANDARD_ERROR):  # belongs to the metric before it
                continue
            kind = re.sub(r"\W+", "_", clean(metric)).strip("_") or "metric"
            facts = _metric_facts(source, metric)
            words = clean(metric_name(metric))
            results.append(
                EvalResult(metric_type=kind, metric_value=value, metric_name=words, metric_args=facts, **shared)
            )
    return results


def _metric_facts(source: Mapping[str, Any], metric: str) -> dict[str, Any] | None:
    """Return what the value of a metric depends on, as plain values."""
    floor = _mapping(source, "floor").get(metric)
    extractor = _mapping(source, "extractor").get("name")
    spread = floor if isinstance(floor, Mapping) else {}
    numbers = {
        "num_images": source.get("num_images"),
        "standard_error": source["metrics"].get(f"{metric}{STANDARD_ERROR}"),
        "floor_mean": spread.get("mean"),
        "floor_std": spread.get("std"),
    }
    facts = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
    return {**facts, **({"extractor": clean(folder_name(str(extractor)))} if extractor else {})} or None


def _dataset(source: Mapping[str, Any]) -> str:
    return clean(public_value(source.get("dataset") or ""))


def metric_name(name: str) -> str:
    """Return the words for a metric."""
    words = METRIC_NAMES.get(name)
    if words:
        return words
    return name.removeprefix("val_").replace("_", " ") + (" (validation)" if name.startswith("val_") else "")


def metric_cell(name: str) -> str:
    """Return Markdown with the words for a metric, for a cell of a table."""
    return METRIC_NAMES.get(name) or cell(metric_name(name))


def shown(value: Any) -> str:
    """Return Markdown with a number or, from a file of others, any other value, for a cell of a table."""
    return number(value) if isinstance(value, (int, float)) else cell(value)


def number(value: Any) -> str:
    """Return a number with four digits, or another value as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return clean(public_value(value))
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def percent(value: Any) -> str:
    """Return a rate as a percentage; "" if it is not a number."""
    return f"{100 * value:.3g} %" if isinstance(value, (int, float)) and math.isfinite(value) else ""


def _mapping(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = source.get(key)
    return value if isinstance(value, Mapping) else {}
