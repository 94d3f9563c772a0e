"""The files of an exported model beside its graphs: its description, its tokenizer, and the pipeline that runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.captions import tokenize_captions
from ..common.checks import side_multiple
from ..common.distilled import check_distilled
from ..common.latents import downsampling_factor, latent_channels
from ..common.schedulers import FLOW, make_scheduler, noise_schedule_of
from ..models.fusion_controlnet import as_nets
from .cli import UserError
from .onnx_parts import trained_cells

# These names are also in `onnx_latent_diffusion.py`, which runs without this file.
CONFIG = "onnx_model.json"
NOISE_SCHEDULE = "alphas_cumprod.npy"
TOKENIZER = "tokenizer.json"
RUNNER = "onnx_latent_diffusion.py"
# Captions whose ids are compared after the export: none, a usual one, one that is truncated, one with unknown letters.
COMPARED_CAPTIONS = ("", "a red circle on white", "a poster of circles " * 100, "Größe 東京 😀\n\tA,b.")


def generates_from_latents(pipeline: Any) -> bool:
    """Whether `OnnxLatentDiffusionPipeline` can run this kind of pipeline."""
    return hasattr(pipeline, "vae") and hasattr(pipeline, "denoiser")


def write_description(pipeline: Any, folder: Path, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write what a program needs to run the parts, and for latent diffusion the pipeline that does it.

    Raises:
        UserError: the model's scheduler or tokenizer cannot be exported.
    """
    description: dict[str, Any] = {"pipeline": type(pipeline).__name__, **settings, "parts": dict(parts)}
    if generates_from_latents(pipeline):
        varying = parts[_denoiser_name(pipeline)]["dynamic_size"]
        description["config"] = latent_diffusion_config(pipeline) | {"dynamic_size": varying}
        _write_noise_schedule(pipeline, folder)
        shutil.copyfile(Path(__file__).with_name(RUNNER), folder / RUNNER)
    else:
        description["config"] = component_configs(pipeline)
    tokenizer = getattr(pipeline, "tokenizer", None)
    if tokenizer is not None:
        write_tokenizer(tokenizer, pipeline.config.get("max_text_length"), folder / TOKENIZER)
    text = json.dumps(description, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def component_configs(pipeline: Any) -> dict[str, Any]:
    """Return the config of every component, by its name, without what Diffusers keeps there for itself."""
    configs = {name: getattr(component, "config", None) for name, component in pipeline.components.items()}
    return {
        name: {key: value for key, value in config.items() if not key.startswith("_")}
        for name, config in configs.items()
        if isinstance(config, Mapping)
    }


def latent_diffusion_config(pipeline: Any) -> dict[str, Any]:
    """Return the numbers with which `OnnxLatentDiffusionPipeline` samples."""
    vae, network = pipeline.vae, pipeline.denoiser
    config, factor = network.config, downsampling_factor(vae)
    classes = config.get("num_class_embeds")
    return {
        "denoiser": _denoiser_name(pipeline),
        "takes_text": pipeline.text_encoder is not None,
        "num_classes": None if classes is None else int(classes) - 1,
        "id2label": pipeline.config.id2label,
        "sample_size": list(trained_cells(network)),
        "vae_scale_factor": factor,
        "size_multiple": factor * side_multiple(network),
        "latent_channels": latent_channels(vae),
        "latents": latent_scaling(vae),
        "least_noise_level": float(config.get("least_noise_level") or 0.0),
        "distilled": check_distilled(pipeline.config.get("distilled")),
        "restart_levels": list(config.get("restart_levels") or ()),
        "controlnets": len(as_nets(pipeline.controlnet)) if hasattr(pipeline, "controlnet") else 0,
        "scheduler": scheduler_config(pipeline),
    }


def latent_scaling(vae: Any) -> dict[str, list[float]]:
    """Return shift, std and factor of `latents = (z - shift) / std * factor`, each for all channels or per channel."""
    config = vae.config
    measured = config.get("latents_mean") is not None or config.get("latents_std") is not None
    names = ("latents_mean", "latents_std") if measured else ("shift_factor", "")
    values = (config.get(names[0]), config.get(names[1]), config.get("scaling_factor"))
    scaling = {}
    for name, value, neutral in zip(("shift", "std", "factor"), values, (0.0, 1.0, 1.0), strict=True):
        several = isinstance(value, (list, tuple))
        scaling[name] = [float(each) for each in value] if several else [float(neutral if value is None else value)]
    return scaling


def scheduler_config(pipeline: Any) -> dict[str, Any]:
    """Return the config of the sampler, and its name: that of the model where the exported pipeline has it.

    Raises:
        UserError: the exported pipeline does not have the noise schedule of the model.
    """
    own, prediction_type = pipeline._own_scheduler, pipeline.config.prediction_type
    flow = prediction_type == FLOW
    config = make_scheduler("euler" if flow else "ddim", own).config
    unusual = [name for name in ("use_dynamic_shifting", "use_karras_sigmas") if own.config.get(name)]
    if unusual or (not flow and config.timestep_spacing != "trailing"):
        difference = unusual[0] if unusual else f"the timestep_spacing '{config.timestep_spacing}'"
        raise UserError(
            f"the scheduler of the model, {type(own).__name__}, has {difference}, which the exported pipeline does not "
            "have; set another one with `pipeline.set_scheduler` and save the pipeline"
        )
    name = "euler" if flow else "dpm" if type(own).__name__.startswith("DPMSolverMultistep") else "ddim"
    return {
        "name": name,
        "prediction_type": prediction_type,
        "num_train_timesteps": int(config.num_train_timesteps),
        "shift": float(config.get("shift", 1.0)),
        "shift_terminal": config.get("shift_terminal"),
    }


def _write_noise_schedule(pipeline: Any, folder: Path) -> None:
    import numpy as np

    if pipeline.config.prediction_type != FLOW:
        schedule = noise_schedule_of(make_scheduler("ddim", pipeline._own_scheduler))
        assert schedule is not None
        np.save(folder / NOISE_SCHEDULE, schedule.float().numpy())


def write_tokenizer(tokenizer: Any, length: int | None, path: Path) -> None:
    """Write a tokenizer for the library tokenizers that pads and truncates to `length`; None leaves captions as is.

    Raises:
        UserError: it is not a tokenizer of that library, or does not give the same ids.
    """
    from tokenizers import Tokenizer

    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"the tokenizer of the model, {type(tokenizer).__name__}, has no `tokenizer.json`, which an exported model "
            "needs; train with a fast tokenizer of Transformers"
        )
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if length is not None:
        copy.enable_truncation(length, direction=tokenizer.truncation_side)
        pad = {"pad_id": tokenizer.pad_token_id, "pad_token": tokenizer.pad_token}
        copy.enable_padding(length=length, direction=tokenizer.padding_side, **pad)
        ids = [encoded.ids for encoded in copy.encode_batch(list(COMPARED_CAPTIONS))]
        expected = tokenize_captions(tokenizer, COMPARED_CAPTIONS, length).tolist()
        if ids != expected:
            raise UserError(
                f"the tokenizer of the model, {type(tokenizer).__name__}, gives other ids without Transformers, so it "
                "cannot be exported; train with a tokenizer of `data_scripts/train_tokenizer.py`"
            )
    copy.save(str(path))


def _denoiser_name(pipeline: Any) -> str:
    return "unet" if getattr(pipeline, "transformer", None) is None else "transformer"
