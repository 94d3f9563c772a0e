"""The training loop with everything on, and a bare PyTorch loop for comparison.

Both train the same networks on the same latents with the same number of threads. They run either in separate
processes, for the speed and the peak memory of whole processes, or in one process in turn, for a speed ratio that a
busy machine disturbs less.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pipelines.tools.devices import get_device, has_accelerator_device
from training.benchmarks.children import in_child, peak_mb
from training.benchmarks.inputs import BenchmarkConfig, Inputs
from training.benchmarks.results import HOST_TIME, LOOP_RATIO, LOOP_SPEED, Metric, quartiles, ratio, spread
from training.core.batches import fetch
from training.core.draws import SampleKey
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.data.latent_cache.dataset import LatentCache, LatentCacheDataset, Samples
from training.data.tokenization import load_tokenizer
from training.engine.session import train
from training.models.attention import attention_kernel
from training.models.text_encoder import new_text_encoder
from training.models.unet import build_unet
from training.models.vae_loading import load_vae
from training.train_latent_diffusion import Config, LatentDiffusionStage

WARM_UP_STEPS = 5
BLOCK_STEPS = 5
"""Number of consecutive steps of one side when both take turns in one process."""


class BareLoop:
    """A minimal training loop for this one model, with latents in memory and captions tokenized beforehand.

    It runs on the same device as the loop of Halftone.
    """

    def __init__(self, config: Config):
        from pipelines.common.latents import scale_latents
        from pipelines.latent_diffusion import tokenize_captions

        torch.set_num_threads(config.cpu_threads)
        self.device = get_device()
        cache = LatentCache(str(config.latent_cache)).split("train")
        batch = fetch(cache, [SampleKey(row, 0) for row in range(len(cache))])
        vae = load_vae(config.vae)
        self.mean = scale_latents(vae, batch["mean"]).to(self.device)
        one_above = scale_latents(vae, batch["mean"] + (0.5 * batch["logvar"]).exp())
        self.std = one_above.to(self.device) - self.mean
        tokenizer, length = load_tokenizer(str(config.tokenizer)), config.text_encoder.max_length
        self.ids = tokenize_captions(tokenizer, batch["caption"], length).to(self.device)
        self.null_ids = tokenize_captions(tokenizer, [""], length).to(self.device)
        self.text_encoder = new_text_encoder(config.text_encoder, tokenizer).to(self.device)
        channels, height = self.mean.shape[1:3]
        self.unet = build_unet(config.model, channels, height, config.text_encoder.hidden_size, 0).to(self.device)
        parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
        self.batch_size, self.dropout = config.train_batch_size, config.cfg_dropout
        self._order: torch.Tensor = torch.empty(0, dtype=torch.long)
        self._autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16)
        self._mixed = config.mixed_precision == "bf16"
        if config.compile:
            self.unet.compile()

    def forward(self) -> torch.Tensor:
        """Return the loss of the next batch."""
        from pipelines.latent_diffusion import encode_captions

        if len(self._order) < self.batch_size:
            self._order = torch.randperm(len(self.mean))
        rows, self._order = self._order[: self.batch_size], self._order[self.batch_size :]
        x_0 = self.mean[rows] + self.std[rows] * torch.randn_like(self.std[rows])
        noise, sigma = torch.randn_like(x_0), torch.sigmoid(torch.randn(len(rows), device=self.device))
        weights = sigma.reshape(-1, 1, 1, 1)
        dropped = torch.rand(len(rows), 1, device=self.device) < self.dropout
        x_t = (1 - weights) * x_0 + weights * noise
        # The attention kernel is that of the stage, so that only the loops differ.
        with self._autocast(enabled=self._mixed), attention_kernel(x_0[0, 0].numel()):
            text = encode_captions(self.text_encoder, torch.where(dropped, self.null_ids, self.ids[rows]))
            prediction = self.unet(x_t, 1000 * sigma, encoder_hidden_states=text).sample
        return F.mse_loss(prediction.float(), noise - x_0)

    def step(self) -> None:
        loss = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()


def measure_bare(config: Config, steps: int) -> dict[str, float]:
    """Measure images per second and peak memory (MB) of a process that runs the bare loop."""
    bare = BareLoop(config)
    seconds = _timed(bare.step, WARM_UP_STEPS, steps)
    return {"images_per_second": config.train_batch_size * steps / seconds, "peak_mb": peak_mb()}


def measure_loop(config: Config, steps: int) -> dict[str, float]:
    """Measure images per second and peak memory (MB) of a process that runs the loop.

    `peak_mb` is the peak up to the last step; `peak_with_export_mb` includes what follows it (validation, previews,
    checkpoint, export).
    """
    stamps: list[float] = []
    at_last_step: list[float] = []

    def before_batch() -> None:
        stamps.append(time.perf_counter())
        at_last_step[:] = [peak_mb()]

    config.max_train_steps = WARM_UP_STEPS + steps + 1
    train(functools.partial(_watched_stage, before_batch), config)
    # settle_buckets requests one batch before the first step, and previews request some after the last step: among the
    # first max_train_steps requests, the last steps + 1 belong to consecutive training steps.
    stamps = stamps[: config.max_train_steps]
    seconds = stamps[-1] - stamps[-1 - steps]
    return {
        "images_per_second": config.train_batch_size * steps / seconds,
        "peak_mb": at_last_step[0],
        "peak_with_export_mb": peak_mb(),
    }


def measure_turns(config: Config, steps: int) -> dict[str, float]:
    """Measure the loop against the bare loop, while both train in turn in one process.

    Returns:
        Medians over pairs of blocks of steps with their quartiles: `ratio`, the speed of the loop relative to the bare
        loop, `cpu_ratio`, the same in CPU time, which other work on the machine hardly changes, `host_ms`, the CPU
        time in ms that a step of the loop takes longer, and `step_seconds`, the time of a step of the loop.
    """
    bare = BareLoop(config)
    blocks = max(3, steps // BLOCK_STEPS)
    of_loop: list[Block] = []
    of_bare: list[Block] = []
    count, left = 0, Block.now()

    def before_batch() -> None:
        nonlocal count, left
        if count % BLOCK_STEPS == 0 and count <= blocks * BLOCK_STEPS:
            if count:
                of_loop.append(left.until_now())
            began = Block.now()
            _timed(bare.step, 0, BLOCK_STEPS)
            of_bare.append(began.until_now())
            left = Block.now()
        count += 1

    config.max_train_steps = blocks * BLOCK_STEPS + 1
    train(functools.partial(_watched_stage, before_batch), config)
    # The first pair is warm-up. A block of the loop is compared with the mean of the bare blocks before and after it.
    pairs = [(of_loop[i], of_bare[i], of_bare[i + 1]) for i in range(1, min(len(of_loop), len(of_bare) - 1))]
    ratios = [(a.seconds + b.seconds) / 2 / loop.seconds for loop, a, b in pairs]
    cpu_ratios = [(a.cpu + b.cpu) / 2 / loop.cpu for loop, a, b in pairs]
    host = [1000 * (loop.cpu - (a.cpu + b.cpu) / 2) / BLOCK_STEPS for loop, a, b in pairs]
    step_seconds = [loop.seconds / BLOCK_STEPS for loop, _, _ in pairs]
    measured = {"ratio": ratios, "cpu_ratio": cpu_ratios, "host_ms": host, "step_seconds": step_seconds}
    medians = [_with_quartiles(name, values) for name, values in measured.items()]
    return {"pairs": len(pairs)} | {name: value for one in medians for name, value in one.items()}


def finish() -> None:
    """Wait until the GPU has done what it was asked for; a CPU has."""
    if has_accelerator_device():
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class Block:
    """Wall time and CPU time in seconds: at a moment at which all work is done, or between two such moments."""

    seconds: float
    cpu: float

    @classmethod
    def now(cls) -> Block:
        finish()
        return cls(time.perf_counter(), time.process_time())

    def until_now(self) -> Block:
        now = Block.now()
        return Block(now.seconds - self.seconds, now.cpu - self.cpu)


def _with_quartiles(name: str, values: Sequence[float]) -> dict[str, float]:
    low, high = quartiles(values)
    return {
        name: statistics.median(values),
        f"{name}_low": values[0] if low is None else low,
        f"{name}_high": values[0] if high is None else high,
    }


def _watched_stage(before_batch: Callable[[], None], config: Config, context: StageContext) -> LatentDiffusionStage:
    """Return the stage; `before_batch` is called for each batch that the loop requests, that is once a step."""
    stage = LatentDiffusionStage(config, context)
    data = stage.training_set
    assert isinstance(data, LatentCacheDataset)
    read = data.__getitems__

    def read_watched(keys: Sequence[SampleKey]) -> Samples:
        before_batch()
        return read(keys)

    data.__getitems__ = read_watched  # type: ignore[method-assign]
    return stage


def _timed(action: Callable[[], None], warm_up: int, times: int) -> float:
    for _ in range(warm_up):
        action()
    finish()
    started = time.perf_counter()
    for _ in range(times):
        action()
    finish()
    return time.perf_counter() - started


def measure_in_this_process(
    recipe: str, side: str, steps: int, threads: int, flags: Sequence[str] = ()
) -> dict[str, float]:
    """Measure one side, or both in turn, and return what `measure_bare`, `measure_loop` or `measure_turns` returns.

    Args:
        flags: more flags of the training script.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", f"{folder}/run", "--cpu_threads", str(threads), "--overwrite", "true"]
        config = parse_config(Config, ["--config", recipe, *words, *flags])
        measure = {"bare": measure_bare, "loop": measure_loop, "turns": measure_turns}[side]
        return measure(config, steps)


def measure_loop_and_bare_loop(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Compare the loop with everything on with the bare loop: speed in whole processes and in turn, memory, CPU time.

    The CPU time is that of one thread with a tiny network, where the difference is not lost in the network's own.
    """

    def measured(side: str, steps: int, recipe: Path = inputs.recipe, threads: int = config.thread_count) -> Any:
        return in_child(config.quick, measure_in_this_process, str(recipe), side, steps, threads)

    steps = 2 if config.quick else config.steps
    sides: dict[str, list[dict[str, float]]] = {"bare": [], "loop": []}
    for _ in range(config.times(config.pairs)):
        for side, results in sides.items():
            results.append(measured(side, steps))
    turns = measured("turns", 2 * steps)
    host = measured("turns", 20 if config.quick else 300, inputs.tiny_recipe, 1)
    speeds = {side: [r["images_per_second"] for r in results] for side, results in sides.items()}
    bare_peaks = [r["peak_mb"] for r in sides["bare"]]
    more, with_export = (
        [r[name] - bare for r, bare in zip(sides["loop"], bare_peaks, strict=True)]
        for name in ("peak_mb", "peak_with_export_mb")
    )
    whole = "speed over the bare loop, whole processes"
    memory = "peak memory above the bare loop's"
    return [
        spread("bare loop", speeds["bare"], "images/s"),
        spread(LOOP_SPEED, speeds["loop"], "images/s"),
        Metric(LOOP_RATIO, turns["ratio"], "", 0.98, False, turns["ratio_low"], turns["ratio_high"]),
        Metric(
            "the same, in CPU time",
            turns["cpu_ratio"],
            "",
            None,
            False,
            turns["cpu_ratio_low"],
            turns["cpu_ratio_high"],
        ),
        ratio(whole, speeds["loop"], speeds["bare"], "", 0.98),
        Metric(HOST_TIME, host["host_ms"], "ms", None, False, host["host_ms_low"], host["host_ms_high"]),
        spread(f"{memory}, training steps", more, "MB", 300, at_most=True),
        spread(f"{memory}, export included", with_export, "MB", 300, at_most=True),
    ]
