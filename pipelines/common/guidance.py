"""Guidance at a part of the noise levels, and guidance by a weaker version of the model.

Shapes: B images, C latent channels, h w latent cells.

- A guidance interval (Kynkäänniemi et al. 2024, arXiv 2404.07724): at high noise levels guidance reduces the variety of
  the images, and at low ones it has little effect. Outside of the interval only the conditional prediction is computed.
- Autoguidance (Karras et al. 2024, arXiv 2406.02507): instead of the unconditional prediction, that of an earlier
  checkpoint for the same condition is used, so that models without conditions can be guided too.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_numbers, is_number
from .conditions import is_empty
from .schedulers import FLOW, noise_schedule_of

WHOLE_INTERVAL = (0.0, 1.0)


def noise_level(timestep: float, noise_schedule: Tensor | None, num_train_timesteps: int) -> float:
    """Return the noise level of a timestep, which is sigma / (alpha + sigma) of x_t = alpha x_0 + sigma noise.

    It is 0 for a clean sample and 1 for pure noise, with every prediction type. For flow matching it is sigma itself.
    The sigma of Karras et al. 2022 is sigma / alpha = level / (1 - level). The result is rounded to 6 digits, because
    the timesteps of a scheduler are float32.

    Args:
        timestep: from 0 to `num_train_timesteps`; some schedulers use fractions.
        noise_schedule: cumulative alphas (alpha² of each training timestep), between which the level is interpolated
            linearly; None for flow matching, where sigma = timestep / num_train_timesteps.
    """
    if noise_schedule is None:
        return round(timestep / num_train_timesteps, 6)

    def trained(index: int) -> float:
        alpha_squared = float(noise_schedule[min(index, len(noise_schedule) - 1)])
        alpha, sigma = math.sqrt(alpha_squared), math.sqrt(1 - alpha_squared)
        return sigma / (alpha + sigma)

    before = math.floor(timestep)
    share = timestep - before
    return round((1 - share) * trained(before) + share * trained(before + 1), 6)


def guided_timesteps(scheduler: Any, prediction_type: str, interval: Sequence[float]) -> Callable[[Any], bool]:
    """Return the function that says whether a timestep has a noise level in the interval: low < level <= high.

    The whole interval contains every timestep. The function then does not read it, which would wait for a GPU.

    Args:
        scheduler: the scheduler that the model was created with, which has its noise schedule.
    """
    low, high = interval
    if (low, high) == WHOLE_INTERVAL:
        return lambda timestep: True
    schedule = None if prediction_type == FLOW else noise_schedule_of(scheduler)
    trained = int(scheduler.config.num_train_timesteps)
    return lambda timestep: low < noise_level(float(timestep), schedule, trained) <= high


def check_guidance_interval(interval: Any, scheduler: Any, prediction_type: str) -> None:
    """Raise a ValueError if `interval` is not (low, high) with 0 <= low <= high <= 1, or noise levels are not known."""
    numbers = isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(is_number, interval))
    if not numbers or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            "`guidance_interval` must be two noise levels (low, high) with 0 <= low <= high <= 1, such as (0.1, 0.8), "
            f"but is {interval!r}"
        )
    if tuple(interval) != WHOLE_INTERVAL and prediction_type != FLOW and noise_schedule_of(scheduler) is None:
        raise ValueError(
            f"`guidance_interval` needs the noise schedule of the model, but its {type(scheduler).__name__} has no "
            f"`alphas_cumprod`; leave it out, or pass (0, 1) instead of {interval!r}"
        )


def check_autoguidance(
    pipeline: Any, guidance_model: Any, autoguidance_scale: Any, negative_prompt: Any, negative_embeds: Any
) -> None:
    """Raise a ValueError if the arguments of autoguidance cannot be used."""
    check_numbers(autoguidance_scale=autoguidance_scale)
    if guidance_model is None:
        return
    check_guide(pipeline, guidance_model)
    if not is_empty(negative_prompt) or negative_embeds is not None:
        name = "negative_prompt" if negative_embeds is None else "negative_prompt_embeds"
        raise ValueError(
            f"`{name}` has no effect with `guidance_model`, which replaces its prediction; pass one of them"
        )


def denoiser_of(guide: Any) -> Any:
    """Return the network of a pipeline that guides, or the network itself."""
    if not hasattr(guide, "components") or isinstance(guide, type):
        return guide
    return guide.components.get("transformer") or guide.components.get("unet")


def check_guide(pipeline: Any, guide: Any) -> None:
    """Raise a ValueError if `guide`, a pipeline or its network, is not another version of the model of `pipeline`."""
    network = denoiser_of(guide)
    if not isinstance(network, nn.Module) or not hasattr(network, "config"):
        raise ValueError(
            f"`guidance_model` must be the pipeline of an earlier checkpoint, or its network, but is {guide!r}"
        )
    _check_same("", pipeline.denoiser, network)
    if network is guide:
        return
    for name in ("prediction_type", "id2label"):
        _check_equal(name, pipeline.config.get(name), guide.config.get(name))
    mine, its = (noise_schedule_of(getattr(one, "_own_scheduler", one.scheduler)) for one in (pipeline, guide))
    if mine is not None and its is not None and not torch.equal(mine.float().cpu(), its.float().cpu()):
        raise ValueError(_difference("has another noise schedule"))
    _check_same("vae", pipeline.vae, guide.vae)
    if not same_weights(pipeline.vae, guide.vae):
        raise ValueError(_difference("has an autoencoder with other weights, and so another latent space"))
    if hasattr(guide, "controlnet"):
        if not hasattr(pipeline, "controlnet"):
            raise ValueError(_difference("has a ControlNet, and this model has none"))
        _check_same("controlnet", pipeline.controlnet, guide.controlnet)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights; those of the higher precision are rounded to the lower one."""
    if one is other:
        return True
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(_equal(mine[name], its[name]) for name in mine)


def _equal(one: Tensor, other: Tensor) -> bool:
    dtype = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(dtype), other.to(one.device, dtype))


def _check_same(component: str, mine: Any, its: Any) -> None:
    """Raise a ValueError that names the first difference of two components: their class, or a value of their config."""
    where = f"{component}." if component else ""
    classes = [type(getattr(one, "_orig_mod", one)).__name__ for one in (mine, its)]  # torch.compile wraps a network
    _check_equal(f"{where}class", *classes)
    configs = [getattr(one, "config", {}) for one in (mine, its)]
    names = dict.fromkeys(name for config in configs for name in config if not name.startswith("_"))
    for name in names:
        _check_equal(f"{where}{name}", *(config.get(name) for config in configs))


def _check_equal(name: str, mine: Any, its: Any) -> None:
    mine, its = (list(value) if isinstance(value, tuple) else value for value in (mine, its))
    if mine != its:
        raise ValueError(_difference(f"has `{name}` {its}, and this model {mine}"))


def _difference(difference: str) -> str:
    return (
        f"`guidance_model` must be another version of the same model, but it {difference}; pass an earlier "
        "checkpoint of the same run"
    )
