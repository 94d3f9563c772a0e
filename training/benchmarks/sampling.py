"""Sampling: the pipeline against a plain loop of Diffusers, and the time and quality of samplers.

B images, C h w latents, H W pixels.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.tools.cli import UserError
from pipelines.tools.devices import synchronize
from training.benchmarks.children import in_child, peak_mb
from training.benchmarks.inputs import BenchmarkConfig, Inputs
from training.benchmarks.results import SAMPLING_TIME, Metric, in_turns, ratio, short, spread

TOLERANCE = 1e-4
GUIDANCE_SCALE = 2.5
PROMPTS = ("a minimalist poster, blue on cream", "a poster with a red circle", "a poster with waves", "two triangles")
SCHEDULERS = ("euler", "heun", "dpm", "unipc")
STEPS = (5, 10, 25, 50)


def open_pipeline(model: str, threads: int) -> Any:
    """Return a pipeline on the CPU or GPU, as `sample.py` loads it, with this number of CPU threads."""
    from pipelines.tools.loading import load_on_device
    from training.engine.launch import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    pipeline = load_on_device(model, None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def plain_loop(pipeline: Any, prompts: list[str], noise: Tensor, steps: int) -> Tensor:
    """Sample with the networks and the scheduler class of the pipeline, as in the tutorials of Diffusers.

    Args:
        noise: B C h w.

    Returns:
        Images in [0, 1], B 3 H W.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    texts = [""] * len(prompts) + prompts
    length = pipeline.config.max_text_length
    tokens = pipeline.tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    text = pipeline.text_encoder(tokens.to(noise.device)).last_hidden_state
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise
    for timestep in scheduler.timesteps:
        prediction = pipeline.unet(torch.cat([x, x]), timestep, encoder_hidden_states=text).sample
        uncond, cond = prediction.chunk(2)
        x = scheduler.step(uncond + GUIDANCE_SCALE * (cond - uncond), timestep, x).prev_sample
    config = pipeline.vae.config
    mean, std = (torch.tensor(config[name]).reshape(1, -1, 1, 1).to(x) for name in ("latents_mean", "latents_std"))
    z = x / config.scaling_factor * std + mean  # as in the pipeline of SDXL
    return (pipeline.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)


def compare_with_plain_loop(model: str, threads: int, steps: int, turns: int) -> dict[str, list[float]]:
    """Return the seconds of `pipeline` and `plain` in turn, for the same four images, and their `difference`.

    Raises:
        UserError: the images differ by more than `TOLERANCE`, so that the times would be of different work.
    """
    pipeline, prompts = open_pipeline(model, threads), list(PROMPTS)
    side = pipeline.unet.config.sample_size
    shape = (len(prompts), pipeline.unet.config.in_channels, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipeline.device)

    options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE, "output_type": "pt"}

    def ours() -> Tensor:
        images = pipeline(prompts, latents=noise, **options).images
        synchronize(pipeline.device)
        return images

    def plain() -> Tensor:
        images = plain_loop(pipeline, prompts, noise, steps)
        synchronize(pipeline.device)
        return images

    difference = float((ours() - plain()).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"the images of the pipeline and of the plain loop differ by {difference:.2g}, more than {TOLERANCE:g}; "
            "make the benchmark's model again (delete its work folder), or report this"
        )
    return {"difference": [difference], **in_turns({"pipeline": ours, "plain": plain}, turns)}


def measure_pipeline(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Compare the pipeline with a plain loop of Diffusers on the same networks, noise, scheduler and steps."""
    steps, turns = (2, 1) if config.quick else (25, 9)
    measured = in_child(
        config.quick, compare_with_plain_loop, str(inputs.model), config.thread_count, steps=steps, turns=turns
    )
    pipeline, plain = measured["pipeline"], measured["plain"]
    return [
        Metric("largest difference of the images", measured["difference"][0], "", TOLERANCE, at_most=True),
        spread(f"pipeline, 4 images, {steps} steps with guidance", pipeline, "s"),
        spread(f"plain loop of Diffusers, 4 images, {steps} steps with guidance", plain, "s"),
        ratio("speed of the pipeline over the plain loop", plain, pipeline, "", 0.97),
    ]


def time_samplers(model: str, threads: int, settings: list[tuple[str, int]], turns: int) -> list[list[float]]:
    """Return the seconds for each image for each of (scheduler, steps), measured in turn with batches of four."""
    pipeline, prompts = open_pipeline(model, threads), list(PROMPTS)

    def sample(scheduler: str, steps: int) -> None:
        pipeline.set_scheduler(scheduler)
        options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE, "output_type": "pt"}
        pipeline(prompts, generator=0, **options)
        synchronize(pipeline.device)

    sample(*settings[0])
    sides = {f"{name} {steps}": functools.partial(sample, name, steps) for name, steps in settings}
    return [[s / len(prompts) for s in seconds] for seconds in in_turns(sides, turns, warm_up=0).values()]


def measure_sampling(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Measure samplers at several numbers of steps: seconds for an image, and with --model their distance (KID)."""
    steps = (25,) if config.quick else STEPS
    settings = [(name, count) for name in SCHEDULERS[: 2 if config.quick else None] for count in steps]
    times = in_child(config.quick, time_samplers, str(inputs.model), config.thread_count, settings, config.times(3))
    # The measurement has another working folder. A name that is not a path here is a Hub id.
    model = str(Path(config.model).resolve()) if config.model and Path(config.model).exists() else config.model
    metrics = []
    for (name, count), seconds in zip(settings, times, strict=True):
        title = SAMPLING_TIME if (name, count) == ("euler", 25) else f"{name}, {count} steps: an image"
        metrics.append(spread(title, seconds, "s"))
        if model:
            value, error = in_child(config.quick, kid_of, model, config.thread_count, name, count, config.num_images)
            metrics.append(
                Metric(f"{name}, {count} steps: KID ± {short(error)}", value, low=value - error, high=value + error)
            )
    return metrics


def kid_of(model: str, threads: int, scheduler: str, steps: int, num_images: int) -> tuple[float, float]:
    """Return the KID of a trained model's images with one sampler, with its standard error (see evaluate.py)."""
    from training.core.parsing import parse_config
    from training.evaluate import EvaluationConfig, evaluate

    torch.set_num_threads(threads)
    words = [
        *("--model", model, "--scheduler", scheduler, "--num_inference_steps", str(steps)),
        *("--num_images", str(num_images), "--copy_spaces", "[]", "--replay_images", "0"),
    ]
    results = evaluate(parse_config(EvaluationConfig, words))
    if "kid" not in results["metrics"]:
        raise UserError(f"--model {model}: KID was not computed: {results['refused'].get('kid')}")
    return results["metrics"]["kid"], results["metrics"].get("kid_standard_error", 0.0)


def peak_of_sampling(model: str, threads: int, steps: int) -> float:
    """Return the peak memory of this process after sampling eight images with guidance, in MB (10⁶ bytes)."""
    pipeline = open_pipeline(model, threads)
    pipeline(list(PROMPTS) * 2, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, generator=0)
    return peak_mb()
