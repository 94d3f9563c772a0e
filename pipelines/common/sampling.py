"""The sampling loop over any Diffusers scheduler, and noise that belongs to its picture.

Shapes: B pictures, C channels, h w latent cells or pixels.

This file is shipped inside published pipelines, so it imports nothing of ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def denoise(
    scheduler: Any,
    predict: Callable[[Tensor, Any], Tensor],
    noise: Tensor,
    num_inference_steps: int,
    generators: list[torch.Generator] | None,
    progress_bar: Any,
    after_step: Callable[[int, Any, Tensor], tuple[Tensor, bool]],
) -> Tensor:
    """Standard normal noise to samples (B C h w), float32 throughout.

    Args:
        predict: (scaled x_t, timestep) → what the model predicts, float32, guided.
        noise: B C h w.
        generators: of the scheduler's own noise, one a picture; None is the global one.
        progress_bar: called with `total=`, a context manager whose `update()` counts a step.
        after_step: (step from 0, timestep, x) → x, perhaps replaced, and whether to end here.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_arguments = {"generator": generators} if takes_generator else {}
    with progress_bar(total=len(scheduler.timesteps)) as bar:
        for step, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(predict(scaled, timestep), timestep, x, return_dict=False, **step_arguments)[0]
            x, ended = after_step(step, timestep, x)
            bar.update()
            if ended:
                break
    return x


def guided(prediction: Tensor, guidance_scale: float | None) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022), uncond + scale × (cond - uncond).

    Args:
        prediction: 2B C h w, the unconditional half first; B C h w with `guidance_scale` None, as it is.
    """
    if guidance_scale is None:
        return prediction
    uncond, cond = prediction.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def generator_per_image(
    generator: torch.Generator | Sequence[torch.Generator] | None, pictures: int
) -> list[torch.Generator] | None:
    """A stream of noise for each picture: its initial noise and the noise of its own steps.

    Drawn in one tensor for the batch, the second step's noise of the first picture would depend on how many there are.

    Raises:
        ValueError: another number of generators than pictures.
    """
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        seeds = [int(torch.randint(2**62, (1,), generator=generator, device=generator.device)) for _ in range(pictures)]
        return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]
    if len(generator) != pictures:
        raise ValueError(f"`generator` has {len(generator)} entries, but {pictures} pictures are asked for")
    return list(generator)


def initial_noise(shape: Sequence[int], generators: list[torch.Generator] | None, device: torch.device) -> Tensor:
    """Standard normal, float32, of `shape` (B C h w), picture by picture from its own generator."""
    if generators is None:
        return torch.randn(tuple(shape), device=device)
    drawn = [torch.randn(tuple(shape[1:]), generator=g, device=g.device).to(device) for g in generators]
    return torch.stack(drawn)
