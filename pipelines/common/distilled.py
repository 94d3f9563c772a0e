"""The default settings of sampling, and those of a model that was distilled to a few steps.

A distilled model replaces a long sampling with guidance by a few calls of its network. The config of its pipeline has
an entry `distilled` with the number of these steps and the guidance scale of its teacher, which its weights contain.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any, NamedTuple

NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 25, 2.5


class SamplingDefaults(NamedTuple):
    """The number of steps and the guidance scale with which a pipeline samples by default."""

    num_inference_steps: int
    guidance_scale: float


def check_distilled(distilled: Any) -> dict[str, Any] | None:
    """Return the entry `distilled` of a pipeline's config, or None for a model that was not distilled.

    Raises:
        ValueError: it is not a dictionary with `num_inference_steps` and `guidance_scale`.
    """
    if distilled is None:
        return None
    steps = distilled.get("num_inference_steps") if isinstance(distilled, Mapping) else None
    if not isinstance(steps, Integral) or steps < 1 or "guidance_scale" not in distilled:
        raise ValueError(
            "`distilled` must be a dictionary with `num_inference_steps` (at least 1) and `guidance_scale`, but is "
            f"{distilled!r}"
        )
    return dict(distilled)


def sampling_defaults(pipeline: Any) -> SamplingDefaults:
    """Return the defaults of a latent diffusion pipeline: those of its model if it was distilled."""
    distilled = pipeline.config.get("distilled")
    if distilled:
        return SamplingDefaults(int(distilled["num_inference_steps"]), 1.0)
    return SamplingDefaults(NUM_INFERENCE_STEPS, GUIDANCE_SCALE)


def given_or_default(pipeline: Any, num_inference_steps: Any, guidance_scale: Any) -> tuple[Any, Any]:
    """Return the arguments of a call of the pipeline, with its defaults in the place of None."""
    given = (num_inference_steps, guidance_scale)
    steps, scale = (
        usual if value is None else value for value, usual in zip(given, sampling_defaults(pipeline), strict=True)
    )
    return steps, scale


def check_not_guided_twice(pipeline: Any, guidance_scale: Any) -> None:
    """Raise a ValueError if a distilled model, whose weights contain guidance, would be guided."""
    distilled = pipeline.config.get("distilled")
    if distilled and guidance_scale > 1:
        raise ValueError(
            f"`guidance_scale` is {guidance_scale}, but this model was distilled: its weights contain guidance with a "
            f"scale of {distilled['guidance_scale']:g}, and it knows no unconditional prediction; leave the argument "
            "out, or set it to 1"
        )
