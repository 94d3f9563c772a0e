"""The sampling loop for any Diffusers scheduler, and noise from a generator for each image.

Shapes: B images, C channels, h w latent cells or pixels.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def denoise(
    scheduler: Any,
    predict: Callable[[Tensor, Any], Tensor],
    noise: Tensor,
    steps: Mapping[str, Any],
    generators: list[torch.Generator] | None,
    progress_bar: Any,
    after_step: Callable[[int, Any, Tensor], tuple[Tensor, bool]],
    least_noise_level: float = 0.0,
    start: Any = None,
) -> Tensor:
    """Turn standard normal noise into samples (B C h w), in float32 throughout.

    Args:
        predict: (scaled x_t, timestep) → the model's prediction in float32, with guidance applied.
        noise: B C h w.
        steps: arguments of `scheduler.set_timesteps`, such as `{"num_inference_steps": 25}`.
        generators: one generator per image for the scheduler's own noise; None uses the global generator.
        progress_bar: called with `total=`; returns a context manager whose `update()` counts a step.
        after_step: (step from 0, timestep, x) → x, possibly replaced, and whether to stop after this step.
        least_noise_level: for flow matching, the lowest noise level at which the model is called, if there is a higher
            one in the schedule. From there, the last step leads to the clean sample that it predicts.
        start: a `StartingPoint` instead of pure noise, see starting_point.py. Steps are counted from its first one.
    """
    scheduler.set_timesteps(**steps, device=noise.device)
    x, first = noise * getattr(scheduler, "init_noise_sigma", 1.0), 0
    count, last_level = len(scheduler.timesteps), None
    if least_noise_level:
        count, last_level = steps_above(scheduler, least_noise_level)
    if start is not None:
        x = start.begin(scheduler, count)
        first = start.first

    def predicted(x: Tensor, timestep: Any) -> tuple[Tensor, Tensor]:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        return scaled, predict(scaled, timestep)

    with progress_bar(total=count - first) as bar:
        for step, timestep in enumerate(scheduler.timesteps[first:count], start=first):
            if start is not None:
                draw = partial(initial_noise, x.shape, generators, x.device)
                x = start.resampled(scheduler, step, x, partial(predicted, timestep=timestep), draw)
            prediction = predicted(x, timestep)[1]
            if step == count - 1 and last_level is not None:
                x = x - last_level * prediction  # x_t - sigma * flow = x_0
            else:
                fresh = start is not None and start.resamples
                arguments = _step_arguments(scheduler, generators, 0 if fresh else step - first)
                x = scheduler.step(prediction, timestep, x, return_dict=False, **arguments)[0]
            x = x if start is None else start.kept(step, x)
            x, ended = after_step(step - first, timestep, x)
            bar.update()
            if ended:
                break
    return x


def _step_arguments(scheduler: Any, generators: list[torch.Generator] | None, taken: int) -> dict[str, Any]:
    """Return those further arguments of `scheduler.step` that it has, after `taken` steps of the same trajectory."""
    parameters = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {"generator": generators} if "generator" in parameters else {}
    if "order" in parameters:  # LMS counts on the predictions of all steps before, also of those that were not taken
        arguments["order"] = min(parameters["order"].default, taken + 1)
    return arguments


def steps_above(scheduler: Any, level: float) -> tuple[int, float | None]:
    """Return how many timesteps of a schedule of flow matching lie at or above a noise level, at least one.

    The second value is the noise level of the last of them if others follow, and otherwise None.
    """
    levels = [timestep / scheduler.config.num_train_timesteps for timestep in scheduler.timesteps.tolist()]
    count = max(1, sum(each >= level for each in levels))
    return count, levels[count - 1] if count < len(levels) else None


def restarted(
    x: Tensor,
    levels: Sequence[float],
    predict: Callable[[Tensor, Tensor], Tensor],
    num_train_timesteps: int,
    generators: list[torch.Generator] | None,
    start: Any = None,
) -> Tensor:
    """Denoise finished samples of flow matching again, from one low noise level after the other.

    Noise is added and predicted away again (restart sampling: Xu et al. 2023), which corrects errors of the steps. Each
    prediction is the mean of two, with the noise and with its negative (antithetic variates). What a network lets
    through in proportion to the noise, a faint noise in areas of one colour, is then gone.

    Args:
        x: B C h w.
        levels: noise levels in (0, 1), in their order.
        predict: (x_t, timestep) → the flow.
        generators: one generator per image; None uses the global generator.
        start: the `StartingPoint` of the samples, if any. Levels above its own would change more than was asked for.
    """
    for level in levels:
        if start is not None and level > start.noise_level:
            continue
        noise = initial_noise(x.shape, generators, x.device)
        timestep = torch.tensor(level * num_train_timesteps, device=x.device)
        noisy = [(1 - level) * x + level * sign * noise for sign in (1, -1)]
        clean = [each - level * predict(each, timestep) for each in noisy]
        x = (clean[0] + clean[1]) / 2
        x = x if start is None else start.kept(start.last, x)
    return x


def guided(prediction: Tensor, guidance_scale: float | None) -> Tensor:
    """Apply classifier-free guidance (Ho and Salimans 2022): uncond + scale × (cond - uncond).

    For autoguidance, the prediction of the weaker model is in the place of the unconditional one.

    Args:
        prediction: 2B C h w, the unconditional half first; or, with `guidance_scale` None, B C h w, which is returned.
    """
    if guidance_scale is None:
        return prediction
    uncond, cond = prediction.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def generator_per_image(
    generator: int | torch.Generator | Sequence[torch.Generator] | None, num_images: int, streams: int = 1
) -> list[torch.Generator] | None:
    """Return `streams` generators for each image, for its initial noise and for the noise of its sampling steps.

    If the noise of a batch were drawn as one tensor, an image's noise at the second step would depend on the number of
    images. Therefore the first image uses a single generator itself, as it would use it in a list. Every further image
    has a generator of its own, seeded from the state of the single one at the time of the call.

    With an integer, image k (from 0) has a generator with the seed `generator + k`.

    Raises:
        ValueError: there is a list of generators, but not one for each image.
    """
    if generator is None:
        return None
    if isinstance(generator, (int, Integral)):  # NumPy integers are not `int`
        generator = [torch.Generator().manual_seed(int(generator) + number) for number in range(num_images)]
    if isinstance(generator, torch.Generator):
        return _spread(generator, num_images * streams)
    if len(generator) != num_images:
        raise ValueError(
            f"`generator` has {len(generator)} entries, but the number of images is {num_images}; pass one generator, "
            "or one for each image"
        )
    return [stream for one in generator for stream in _spread(one, streams)]


def _spread(generator: torch.Generator, count: int) -> list[torch.Generator]:
    device = generator.device
    copy = torch.Generator(device)  # the seeds must not change what the first image draws
    copy.set_state(generator.get_state())
    seeds = [int(torch.randint(2**62, (1,), generator=copy, device=device)) for _ in range(count - 1)]
    return [generator, *(torch.Generator(device).manual_seed(seed) for seed in seeds)]


def initial_noise(shape: Sequence[int], generators: list[torch.Generator] | None, device: torch.device) -> Tensor:
    """Draw standard normal noise of `shape` (B C h w) in float32, each image from its own generator."""
    if generators is None:
        return torch.randn(tuple(shape), device=device)
    drawn = [torch.randn(tuple(shape[1:]), generator=g, device=g.device).to(device) for g in generators]
    return torch.stack(drawn)
