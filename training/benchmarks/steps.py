"""Single training steps of any stage: their speed with and without a latent cache, and their peak memory."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.benchmarks.children import in_child, peak_mb
from training.benchmarks.inputs import BenchmarkConfig, Inputs
from training.benchmarks.results import LATENTS_TIME, STEP_MEMORY, Metric, in_turns, ratio, spread
from training.core.parsing import parse_config
from training.core.stage import StageContext

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.engine.run_config import RunConfig

MOST_STEPS = 1000
STAGES = {
    "autoencoder": ("train_autoencoder", "AutoencoderStage"),
    "latent diffusion": ("train_latent_diffusion", "LatentDiffusionStage"),
    "a transformer on pixels": ("train_latent_diffusion", "LatentDiffusionStage"),
    "ControlNet": ("train_controlnet", "ControlNetStage"),
    "layout encoder": ("train_encoder", "LayoutEncoderStage"),
    "abstractor": ("train_abstractor", "AbstractorStage"),
    "poster decoder": ("train_decoder", "PosterDecoderStage"),
    "images and captions": ("train_image_caption", "ImageCaptionStage"),
}


class TrainingSteps:
    """The steps of a run without its events: batches, forward and backward passes, optimizers and EMA weights."""

    def __init__(self, stage_name: str, words: Sequence[str], threads: int, accelerator: Accelerator | None = None):
        from training.engine.launch import start_accelerator
        from training.engine.training import Training

        script, stage_class = STAGES[stage_name]
        module = importlib.import_module(f"training.{script}")
        config: RunConfig = parse_config(module.Config, [*words, "--cpu_threads", str(threads)])
        self.config = config
        self.accelerator = accelerator or start_accelerator(config)
        stage = getattr(module, stage_class)(config, StageContext(self.accelerator.device))
        self.training = Training(stage, config, self.accelerator)
        self.batches = self.training.batches.steps(0, MOST_STEPS)
        self.done = 0

    def __call__(self) -> None:
        """Make one step of every phase, and wait for its values."""
        from training.engine.step_values import Requests

        batches = next(self.batches)
        for runner in self.training.runners:
            outcome = runner.step(self.done, batches, self.config.learning_rate, Requests())
            outcome.row.tolist()
        self.done += 1
        if self.training.ema is not None:
            self.training.ema.update(self.done)


def measure_latents(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Compare training steps on cached latents with steps that encode their images, and time batches of latents."""
    pairs = in_child(config.quick, step_pairs, str(inputs.recipe), config.thread_count, config.times(10))
    batch = in_child(config.quick, latent_batches, str(inputs.latents), config.times(100))
    cached, encoded = pairs["cached"], pairs["encoded"]
    return [
        spread("training step on cached latents", [1000 * s for s in cached], "ms"),
        spread("training step that encodes its images", [1000 * s for s in encoded], "ms"),
        ratio("speed with cached latents, over encoding in each step", encoded, cached),
        *batch,
    ]


def step_pairs(recipe: str, threads: int, turns: int) -> dict[str, list[float]]:
    """Return the seconds of steps on cached latents and of steps that encode their images, in turn."""
    words = ["--config", recipe, "--output_dir", "unused"]
    cached = TrainingSteps("latent diffusion", words, threads)
    without_cache = [*words, "--latent_cache", "null"]
    encoded = TrainingSteps("latent diffusion", without_cache, threads, cached.accelerator)
    return in_turns({"cached": cached, "encoded": encoded}, turns)


def latent_batches(latents: str, times: int) -> list[Metric]:
    """Measure the CPU time of assembling batches from a latent cache, with the random numbers of a training step.

    These are two of the shape of the latents (posterior, noise) and three of one number for each sample.
    """
    import time

    import torch

    from training.core.batches import fetch
    from training.core.draws import NEWEST, SampleKey, draws_class
    from training.data.latent_cache.dataset import LatentCache
    from training.engine.launch import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()  # as in training
    cache = LatentCache(latents)
    dataset = cache.split("train", random_flip=True)

    def milliseconds(size: int, with_draws: bool) -> list[float]:
        keys, measured = [SampleKey(i % len(dataset), i) for i in range(size)], []
        for step in range(times + 3):
            started = time.process_time()
            fetch(dataset, keys)
            draws = draws_class(NEWEST)(0, step, range(size))
            for name in ("posterior", "noise") if with_draws else ():
                draws.normal(name, cache.latent_shape)
            for name in ("timesteps", "cfg_dropout", "flip") if with_draws else ():
                draws.uniform(name)
            measured.append(1000 * (time.process_time() - started))
        return measured[3:]

    return [
        spread("latent cache: a batch of 32", milliseconds(32, False), "ms", 1, at_most=True),
        spread(LATENTS_TIME, milliseconds(1024, True), "ms", 12, at_most=True),
    ]


def measure_memory(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Measure the peak memory of a process that makes training steps of each kind, and of one that samples."""
    from training.benchmarks.sampling import peak_of_sampling

    metrics = []
    for name, words in _memory_runs(config, inputs).items():
        peak = in_child(config.quick, peak_of_steps, name, words, config.thread_count, config.times(3))
        metrics.append(Metric(STEP_MEMORY.format(name), peak, "MB"))
    peak = in_child(config.quick, peak_of_sampling, str(inputs.model), config.thread_count, config.times(8))
    return [*metrics, Metric("sampling with guidance, 8 images: peak memory", peak, "MB")]


def _memory_runs(config: BenchmarkConfig, inputs: Inputs) -> dict[str, list[str]]:
    """Return the flags for each kind of training: that of the quickstart or of a small preset."""
    presets = {
        "autoencoder": "autoencoder/quickstart",
        "ControlNet": "controlnet/fusion_add",
        "layout encoder": "posters/encoder_tiny",
        "abstractor": "posters/abstractor_tiny",
        "poster decoder": "posters/decoder_64",
        "images and captions": "image_caption/tiny",
    }
    size = 2 if config.quick else 16
    data = ["--dataset_name", str(inputs.posters), "--output_dir", "unused"]
    batch = ["--train_batch_size", str(size), "--mixed_precision", "no"]
    own = {
        "latent diffusion": ["--config", str(inputs.recipe)],
        "a transformer on pixels": [
            *("--config", str(inputs.recipe), "--denoiser", "transformer", "--vae", "pixels"),
            *("--latent_cache", "null"),
        ],
    }
    more = {
        "ControlNet": ["--base_model", str(inputs.model), "--reader", "null"],
        "abstractor": ["--encoder", "null"],
    }
    named = {name: ["--config", f"configs/experiments/{preset}.yaml"] for name, preset in presets.items()}
    return {name: [*(own | named)[name], *data, *batch, *more.get(name, [])] for name in STAGES}


def peak_of_steps(stage_name: str, words: Sequence[str], threads: int, steps: int) -> float:
    """Return the peak memory of this process after some training steps, in MB (10⁶ bytes)."""
    take_step = TrainingSteps(stage_name, words, threads)
    for _ in range(steps):
        take_step()
    return peak_mb()
