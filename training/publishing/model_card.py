"""Model cards: the README.md of a published pipeline, from a template in model_cards/ and the record of the run.

A card states only facts from the record; a fact that the record lacks is left out, or marked as not measured. Nothing
private is published: tokens are dropped or masked, and local paths are cut to their last part. Text from data, such as
captions and class labels, is written by `literal`, so that it cannot contain links, images or HTML.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.common.class_colors import class_color
from pipelines.common.compatibility import OLDEST_VERSIONS
from pipelines.common.conditions import whole_numbers
from pipelines.common.poster_domain import hex_color
from pipelines.tools.cli import UserError, nearest
from pipelines.tools.credentials import mask_credentials
from pipelines.tools.resources import own_version, shipped_path
from training.core.files import write_atomically
from training.publishing.evaluation_facts import (
    evaluation_facts,
    evaluation_results,
    metric_cell,
    metric_name,
    number,
    shown,
)
from training.publishing.public import cell, clean, fenced, folder_name, literal, public_settings, public_value, visible

TEMPLATES = shipped_path("model_cards")
CARD_NAME = "README.md"
_CLASSES_SHOWN = 1000
# The values that the Hub accepts as `license`; any other licence is published as "other", with its name.
HUB_LICENSES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl unknown other""".split()  # noqa: SIM905 - sixty lines otherwise
)
UNPUBLISHED = "path/to/this/folder"  # what a card says in place of the repository if the model is not on the Hub
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
STOCK_LIBRARIES = ("diffusers", "transformers")
# The task of the Hub for each stage; a diffusion model is listed by what it is conditioned on.
TASKS = {
    "autoencoder": "image-to-image",
    "controlnet": "image-to-image",
    "layout-encoder": "image-segmentation",
    "grammar-abstractor": "image-feature-extraction",
    "image-caption": "any-to-any",
}

# What the model of a stage is, where the name of the stage does not say it.
KINDS = {
    "distillation": "Distilled latent diffusion",
    "fine-tuning of the poster decoder": "Fine-tuned poster decoder",
    "image caption": "Images and captions",
}


def write_model_card(folder: str | os.PathLike[str], template: str, record: Mapping[str, Any]) -> Path:
    """Write `folder`/README.md from `model_cards/<template>` and the record of the run.

    Args:
        folder: the pipeline folder; its model_index.json shows whether loading needs remote code, and whether the
            model takes captions.
        template: a file name in model_cards/.
        record: any of stage, model_name, license, dataset, num_train_images, resolution, steps, epochs,
            global_batch_size, images_seen, hardware, cpu_cores, elapsed_seconds, config, metrics {name: value},
            best {metric, value, step}, num_validation_images, energy {kwh, assumption}, evaluation (evaluation.json),
            prompts, samples_file, sample_captions, versions {name: version}, trust_remote_code, hub_model_id; facts
            that are absent or None are left out.

    Raises:
        UserError: if the template does not exist.
    """
    folder = Path(folder)
    path = folder / CARD_NAME
    write_atomically(path, mask_credentials(_render(folder, template, record)))
    return path


def check_card(template: str) -> None:
    """Render an empty card, so that a missing or broken template is noticed before the first step.

    Raises:
        UserError: if the template, or one that it extends, does not exist.
    """
    _render(TEMPLATES, template, {})


def _render(folder: Path, template: str, record: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["literal"] = literal
    facts = card_facts(folder, {key: value for key, value in record.items() if value is not None})
    try:
        text = environment.get_template(template).render(facts)
    except jinja2.TemplateNotFound as error:
        known = sorted(path.name for path in TEMPLATES.glob("*.jinja"))
        raise UserError(f"no card template {error.name} in {TEMPLATES}{nearest(str(error.name), known)}") from None
    return re.sub(r"\n{3,}", "\n\n", text)


def card_facts(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of the templates: every name that they use, empty where the record has no such fact."""
    config = public_settings(record.get("config") or {})
    conditions = _conditions(folder, record)
    samples = record.get("samples_file")
    prompts = [clean(prompt) for prompt in record.get("prompts") or []]
    captions = [clean(caption) for caption in record.get("sample_captions") or []]
    return {
        "metadata": _metadata(folder, record, conditions),
        "title": _title(folder, record),
        "run_name": literal(_own_name(record)) if record.get("stage") else "",
        "license": record.get("license"),
        "samples_file": samples if samples and (folder / samples).is_file() else "",
        # Earlier versions wrote all captions as prompts.
        "sample_captions": [literal(caption) for caption in captions or prompts],
        "example_prompt": json.dumps(prompts[0] if prompts else "...", ensure_ascii=False),
        "example_size": _sides(record.get("resolution")) or (64, 64),
        "repository": record.get("hub_model_id") or UNPUBLISHED,
        "oldest_versions": " and ".join(f"{name} {version}" for name, version in OLDEST_VERSIONS.items()),
        "trust_remote_code": record.get("trust_remote_code", needs_remote_code(folder)),
        "conditions": " and ".join(conditions),
        "size": _size(record.get("resolution")),
        "num_train_images": record.get("num_train_images"),
        "finetuning": record.get("finetuning"),
        "init_from": literal(config.get("init_from") or config.get("decoder") or ""),
        "from_scratch": bool(config) and not (config.get("init_from") or config.get("decoder")),
        "distilled": _model_index(folder).get("distilled"),
        "teacher": literal(config.get("teacher", "")),
        "pretrained_text_encoder": literal(config.get("pretrained_text_encoder", "")),
        "data": _data(record, config),
        "training": _training(record),
        "config": config,
        "config_block": fenced(_yaml(config), "yaml") if config else "",
        "metrics": [(metric_cell(k), shown(v)) for k, v in (record.get("metrics") or {}).items()],
        "num_validation_images": record.get("num_validation_images"),
        "best": _best(record.get("best") or {}),
        "evaluation": evaluation_facts(record.get("evaluation")),
        "mask_classes": mask_legend(record.get("mask_classes") or []),
        "adapter": _adapter(record.get("adapter") or {}),
        "classes": [literal(name) for name in record.get("classes") or []],
        **_class_facts(folder),
        "versions": ", ".join(f"{name} {number}" for name, number in (record.get("versions") or {}).items()),
        "halftone": own_version(),
    }


def _title(folder: Path, record: Mapping[str, Any]) -> str:
    """Return what the model is and what it was trained on; without a stage, the name of the run."""
    stage, name = str(record.get("stage") or ""), record.get("dataset")
    if not stage:
        return literal(_own_name(record)) or "A Halftone model"
    kind = KINDS.get(stage, stage[:1].upper() + stage[1:])
    if record.get("adapter") and not _model_index(folder):
        kind = f"LoRA adapter: {kind}"
    if not name:
        return literal(kind)
    data = name if is_hub_dataset(name, record.get("config")) else folder_name(str(name))
    return f"{literal(kind)} on {literal(data)}"


def _own_name(record: Mapping[str, Any]) -> str:
    return record.get("model_name") or (record.get("hub_model_id") or "").split("/")[-1]


def _class_facts(folder: Path) -> dict[str, Any]:
    """Return the first class, as code, and the ids and names of all classes that a pipeline generates."""
    id2label = _model_index(folder).get("id2label") or {}
    names = [clean(str(id2label[id_])) for id_ in sorted(id2label, key=int)]
    first = next(iter(names), "0")
    is_code = not names or whole_numbers(names)
    return {
        "example_class": first if is_code else json.dumps(first, ensure_ascii=False),
        "class_ids": [f"{id_}: {literal(name)}" for id_, name in enumerate(names[:_CLASSES_SHOWN])],
        "classes_hidden": max(0, len(names) - _CLASSES_SHOWN),
    }


def _adapter(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a card says about a LoRA adapter and its base model; empty for a model without one."""
    if not adapter:
        return {}
    name, base_id = folder_name(str(adapter["base"]).removesuffix("/pipeline")), adapter.get("base_model_id") or ""
    share = 100 * adapter["parameters"] / adapter["model_parameters"]
    base_id = base_id if HUB_ID.fullmatch(base_id) else ""
    return {**adapter, "base_name": base_id or literal(name), "base_model_id": base_id, "share": share}


def mask_legend(names: Sequence[str]) -> list[tuple[int, str, str]]:
    """Return (class id, name, colour as #rrggbb) for each class of pixels."""
    return [(id_, cell(name), hex_color(class_color(id_))) for id_, name in enumerate(names)]


def needs_remote_code(folder: Path) -> bool:
    """Return whether the pipeline in `folder`, or one of its components, has a class that its own files define."""
    index = _model_index(folder)
    pipeline_class = index.get("_class_name")
    parts = [value[0] for name, value in index.items() if not name.startswith("_") and _is_part(value)]
    return isinstance(pipeline_class, list) or any(library not in STOCK_LIBRARIES for library in parts)


def _is_part(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _model_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _conditions(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Return the conditions of the model: captions if it has a text encoder, class labels if it has classes."""
    index = _model_index(folder)
    chosen = (record.get("config") or {}).get("condition_on")
    has_text = _is_part(index.get("text_encoder"))
    conditions = ["captions"] if has_text or (not index and chosen and "caption" in chosen) else []
    return [*conditions, "class labels"] if index.get("id2label") or (chosen and "label" in chosen) else conditions


def _metadata(folder: Path, record: Mapping[str, Any], conditions: list[str]) -> str:
    """Return the YAML header of the card, made by `huggingface_hub.ModelCardData`."""
    from huggingface_hub import ModelCardData

    stage = re.sub(r"[\s_]+", "-", str(record.get("stage") or "").lower())
    task = _task(stage, conditions)
    results = evaluation_results(record, record.get("evaluation"), task or "other")
    facts: dict[str, Any] = {
        "library_name": "diffusers",
        "tags": [tag for tag in ("diffusers", "halftone", stage) if tag],
        "pipeline_tag": task,
        "datasets": [record["dataset"]] if is_hub_dataset(record.get("dataset"), record.get("config")) else None,
    }
    base = _adapter(record.get("adapter") or {})
    if base and not _model_index(folder):  # the adapter alone, not the pipeline that includes it
        facts["tags"].append("lora")
        facts |= {"base_model": base["base_model_id"], "base_model_relation": base["base_model_id"] and "adapter"}
    license_name = clean(public_value(record.get("license") or ""))
    if license_name and license_name.lower() in HUB_LICENSES:
        facts["license"] = license_name.lower()
    elif license_name:  # the Hub rejects a card whose licence it does not know
        short = re.sub(r"[^a-z0-9.+-]+", "-", license_name.lower()).strip("-")
        facts |= {"license": "other", "license_name": short or "other"}
    if results:
        facts |= {"eval_results": results, "model_name": _model_name(record)}
    return ModelCardData(**{key: value for key, value in facts.items() if value}).to_yaml()


def _model_name(record: Mapping[str, Any]) -> str:
    return clean(_own_name(record)) or "a Halftone model"


def _task(stage: str, conditions: list[str]) -> str | None:
    if "diffusion" not in stage:
        return TASKS.get(stage)
    return "text-to-image" if "captions" in conditions else "unconditional-image-generation"


def is_hub_dataset(name: Any, config: Mapping[str, Any] | None = None) -> bool:
    """Return whether `name` is a dataset on the Hub (`owner/name`) rather than a local folder or file."""
    if not isinstance(name, str) or not HUB_ID.fullmatch(name) or name == (config or {}).get("train_data_dir"):
        return False
    return not Path(name).exists() and not name.startswith("data/")


def _data(record: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    lines = []
    name = record.get("dataset")
    if name and is_hub_dataset(name, record.get("config")):
        lines.append(f"[{name}](https://huggingface.co/datasets/{name})")
    elif name:
        lines.append(f"{literal(folder_name(str(name)))} (local files that are not on the Hub)")
    if record.get("num_train_images"):
        lines.append(f"{record['num_train_images']:,} training images")
    if record.get("resolution"):
        crop = {True: ", centre crop", False: ", random crop"}.get(config.get("center_crop"), "")  # type: ignore[arg-type]
        if (scale := config.get("crop_scale") or 1) < 1:
            crop += f", random crops of {scale:.0%} to 100% of the side"
        flip = ", random horizontal flips" if config.get("random_flip") else ""
        lines.append(f"resized to {_size(record['resolution'])}{crop}{flip}")
    return lines


def _training(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    if record.get("steps"):
        epochs = f" ({record['epochs']:g} epochs)" if record.get("epochs") else ""
        lines.append(("steps", f"{record['steps']:,}{epochs}"))
    if record.get("global_batch_size"):
        lines.append(("images per step", f"{record['global_batch_size']:,}"))
    if record.get("images_seen"):
        lines.append(("images seen", f"{record['images_seen']:,}"))
    if record.get("hardware"):
        cores = f", {record['cpu_cores']} CPU cores" if record.get("cpu_cores") else ""
        lines.append(("hardware", f"{record['hardware']}{cores}"))
    if record.get("elapsed_seconds"):
        lines.append(("time", _duration(record["elapsed_seconds"])))
    energy = record.get("energy")
    if isinstance(energy, Mapping) and energy.get("kwh") is not None:
        assumption = f" ({clean(energy['assumption'])})" if energy.get("assumption") else ""
        lines.append(("energy, a rough estimate", f"{float(energy['kwh']):.2g} kWh{assumption}"))
    return lines


def _best(best: Mapping[str, Any]) -> str:
    if best.get("metric") is None or best.get("value") is None or not best.get("step"):
        return ""
    return f"Best {literal(metric_name(best['metric']))}: {number(best['value'])}, at step {best['step']:,}."


def _size(resolution: Any) -> str:
    sides = _sides(resolution)
    return f"{sides[0]} × {sides[1]} pixels" if sides else ""


def _sides(resolution: Any) -> tuple[Any, Any] | None:
    """Return (width, height) in pixels; None if the resolution is unknown."""
    if not resolution:
        return None
    width, height = resolution if isinstance(resolution, (list, tuple)) else (resolution, resolution)
    return width, height


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return visible(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120).strip())
