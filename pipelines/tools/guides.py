"""Options of guidance on the command line: its scale, its interval, and an earlier checkpoint that guides."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from .cli import UserError
from .generated import model_name
from .loading import load_pipeline

GUIDANCE_OPTIONS = ("guidance_interval", "guide", "autoguidance_scale")
INTERVAL_HELP = (
    "Noise levels between which guidance applies, such as '[0.1,0.8]'; 0 is a clean image and 1 is noise (default: all)"
)
GUIDE_HELP = (
    "Earlier checkpoint of the same run, such as runs/x/checkpoints/step-00001000, that guides instead of the "
    "unconditional prediction (autoguidance), also a model without conditions; --guidance_scale then has no effect"
)
AUTOGUIDANCE_SCALE = 2.0  # the default of LatentDiffusionPipeline
SCALE_HELP = "Scale of the guidance by --guide; 1 disables it (default: 2)"


def add_guidance_options(parser: argparse.ArgumentParser) -> None:
    """Add --guidance_scale, --guidance_interval, --guide and --autoguidance_scale."""
    add = parser.add_argument
    scale_help = "Classifier-free guidance; 1 disables it (default: 2.5, or 1 for a distilled model)"
    add("--guidance_scale", type=float, help=scale_help)
    add("--guidance_interval", type=interval, help=INTERVAL_HELP)
    add("--guide", help=GUIDE_HELP)
    add("--autoguidance_scale", type=float, help=SCALE_HELP)


def interval(text: str) -> list[float]:
    """Parse an interval such as `[0.1,0.8]` or `0.1,0.8`; the pipeline checks its values."""
    try:
        values = json.loads(f"[{text.strip().strip('[]')}]")
        low, high = (float(value) for value in values)
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"give two noise levels, such as '[0.1,0.8]', not {text!r}") from None
    return [low, high]


def guidance_arguments(pipeline: Any, options: Any) -> dict[str, Any]:
    """Return a pipeline's arguments for the options of guidance that are set, with the guide loaded on its device.

    Args:
        options: the command line, or a config; it has `guidance_interval`, `guide` and `autoguidance_scale`.

    Raises:
        UserError: The pipeline does not take an option, its value is invalid, or the guide cannot guide it.
    """
    from ..common.guidance import check_guidance_interval

    given: dict[str, Any] = {}
    if options.guidance_interval is not None:
        _check_taken(pipeline, "guidance_interval")
        given["guidance_interval"] = tuple(options.guidance_interval)
        try:
            check_guidance_interval(
                given["guidance_interval"], pipeline._own_scheduler, pipeline.config.prediction_type
            )
        except ValueError as error:
            raise UserError(f"--guidance_interval: {error}") from error
    if options.autoguidance_scale is not None:
        if options.guide is None:
            raise UserError("--autoguidance_scale has no effect without --guide; add an earlier checkpoint as --guide")
        given["autoguidance_scale"] = options.autoguidance_scale
    if options.guide is not None:
        _check_taken(pipeline, "guide")
        given["guidance_model"] = load_guide(options.guide, pipeline)
    return given


def guidance_facts(options: Any, guidance_scale: float | None) -> dict[str, Any]:
    """Return the settings of guidance that have an effect, by name, for the record of the images."""
    facts: dict[str, Any] = {"guidance_scale": guidance_scale}
    if options.guide is not None:
        scale = options.autoguidance_scale
        facts = {
            "guide": guide_name(options.guide),
            "autoguidance_scale": AUTOGUIDANCE_SCALE if scale is None else scale,
        }
    if options.guidance_interval is not None:
        facts["guidance_interval"] = " to ".join(f"{level:g}" for level in options.guidance_interval)
    return facts


def guidance_texts(options: Any) -> dict[str, str]:
    """Return the settings of guidance as texts, for the metadata of a file."""
    facts = guidance_facts(options, options.guidance_scale)
    return {name: fact if isinstance(fact, str) else f"{fact:g}" for name, fact in facts.items()}


def guide_name(guide: str) -> str:
    """Return the name of `--guide` without paths of this machine: the checkpoint, or a name as of `--model`."""
    path = Path(guide)
    path = path.parent if path.name == "pipeline" else path
    return path.name if path.parent.name == "checkpoints" else model_name(guide)


def load_guide(path: str, pipeline: Any) -> Any:
    """Load an earlier version of `pipeline` for autoguidance, on its device and in its precision.

    It uses the autoencoder of `pipeline`, which must have the same weights, instead of a copy.

    Raises:
        UserError: It does not exist, is another model, or is the same version of the model.
    """
    from ..common.guidance import check_guide, same_weights

    guide = load_pipeline(path, dtype=pipeline.denoiser.dtype)
    if not hasattr(guide, "denoiser"):
        raise UserError(f"--guide {path} is a {type(guide).__name__}; give an earlier checkpoint of the same run")
    try:
        check_guide(pipeline, guide)
    except ValueError as error:
        raise UserError(f"--guide {path}: {error}") from error
    trained = [name for name in ("denoiser", "controlnet") if getattr(pipeline, name, None) is not None]
    if all(
        getattr(guide, name, None) is None or same_weights(getattr(pipeline, name), getattr(guide, name))
        for name in trained
    ):
        raise UserError(
            f"--guide {path} has the same weights as the model, so it cannot guide it; give an earlier checkpoint, "
            "such as runs/x/checkpoints/step-00001000"
        )
    guide.register_modules(vae=pipeline.vae)
    return guide.to(pipeline.device)


def _check_taken(pipeline: Any, option: str) -> None:
    # A pipeline with a ControlNet passes its arguments on, but they are named where they are checked.
    argument = {"guide": "guidance_model"}.get(option, option)
    if argument not in inspect.signature(getattr(pipeline, "check_inputs", pipeline.__call__)).parameters:
        raise UserError(f"{type(pipeline).__name__} does not accept --{option}; leave it out, or use latent diffusion")
