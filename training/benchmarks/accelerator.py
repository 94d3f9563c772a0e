"""A large U-Net on a GPU: the loop against a bare loop, both compiled, and the share of the GPU's matrix rate it uses.

The U-Net has 420 million parameters and trains in bfloat16 on latents of 16×32×32, as for images of 256 pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from pipelines.tools.devices import get_device, has_accelerator_device
from training.benchmarks.children import in_child, run_scripts
from training.benchmarks.inputs import TINY_MODEL, TINY_TEXT, BenchmarkConfig, Inputs
from training.benchmarks.loops import BareLoop, finish, measure_in_this_process
from training.benchmarks.results import Metric, spread
from training.core.parsing import parse_config

RESOLUTION = 256
LARGE = {
    "model": {"block_out_channels": [320, 640, 1280], "layers_per_block": 1, "attention_levels": [1, 2]},
    "text_encoder": {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "max_length": 24},
    "train_batch_size": 64,
}
TINY = {"model": TINY_MODEL, "text_encoder": TINY_TEXT, "train_batch_size": 4}
MATRIX_SIDE = 8192
MATRIX_PRODUCTS = 10
MIN_RATIO, MIN_UTILIZATION = 0.95, 40
"""Goals: the speed over the compiled bare loop, and the percentage of the matrix rate."""
BACKWARD = 2
"""The backward pass of a network computes twice as much as its forward pass."""


def measure_accelerator(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Measure both loops in turn, as they are and compiled; nothing without a GPU, unless to check the benchmark."""
    if not (config.quick or has_accelerator_device()):
        print("there is no GPU, so this part is left out", flush=True)
        return []
    recipe = _write_recipe(inputs, config.quick)
    parameters, flops, batch = in_child(config.quick, cost_of_step, str(recipe), config.thread_count)
    rates = in_child(config.quick, matrix_rates, 64 if config.quick else MATRIX_SIDE, config.times(MATRIX_PRODUCTS))
    rate = spread("matrix products in bfloat16", [rate / 1e12 for rate in rates], "TFLOP/s")
    metrics = [rate, Metric("parameters of the U-Net", parameters / 1e6, "million")]
    steps = 2 if config.quick else config.steps
    # To compile even a tiny network takes minutes on a CPU.
    kinds: dict[str, list[str]] = {"": []} if config.quick else {"": [], ", compiled": ["--compile", "true"]}
    for name, words in kinds.items():
        turns = in_child(
            config.quick, measure_in_this_process, str(recipe), "turns", 2 * steps, config.thread_count, words
        )
        utilization = 100 * flops / turns["step_seconds"] / (rate.value * 1e12)
        goals = (MIN_RATIO, MIN_UTILIZATION) if name else (None, None)
        low, high = turns["ratio_low"], turns["ratio_high"]
        metrics += [
            Metric(f"training with everything on{name}", batch / turns["step_seconds"], "images/s"),
            Metric(f"speed over the bare loop{name}", turns["ratio"], "", goals[0], False, low, high),
            Metric(f"share of the matrix rate{name}", utilization, "%", goals[1]),
        ]
    return metrics


def cost_of_step(recipe: str, threads: int) -> tuple[int, float, int]:
    """Return the parameters of the U-Net, the operations (FLOP) of a training step of it, and the batch size."""
    from torch.utils.flop_counter import FlopCounterMode

    from training.train_latent_diffusion import Config

    config = parse_config(Config, ["--config", recipe, "--output_dir", "unused", "--cpu_threads", str(threads)])
    bare = BareLoop(config)
    with FlopCounterMode(display=False) as counter:
        bare.forward()
    parameters = sum(p.numel() for p in bare.unet.parameters())
    return parameters, (1 + BACKWARD) * float(counter.get_total_flops()), config.train_batch_size


def matrix_rates(side: int, times: int) -> list[float]:
    """Return the rates (FLOP/s) of products of two square matrices of random numbers in bfloat16."""
    device = get_device()
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(times + 3):  # the first ones are warm-up
        finish()
        started = time.perf_counter()
        for _ in range(MATRIX_PRODUCTS):
            a @ b
        finish()
        rates.append(MATRIX_PRODUCTS * 2 * side**3 / (time.perf_counter() - started))
    return rates[3:]


def _write_recipe(inputs: Inputs, quick: bool) -> Path:
    """Write the config of the large U-Net and the latents that it is trained on; return its path."""
    path, latents = inputs.folder / "large.yaml", inputs.folder / "large_latents"
    resolution = 64 if quick else RESOLUTION
    values = yaml.safe_load(inputs.recipe.read_text(encoding="utf-8"))
    values |= {"resolution": resolution, "latent_cache": str(latents), "mixed_precision": "bf16"}
    values |= TINY if quick else LARGE
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    if not (latents / "cache.json").exists():
        in_child(quick, run_scripts, [_latents_command(inputs, latents, resolution)])
    return path


def _latents_command(inputs: Inputs, latents: Path, resolution: int) -> Sequence[str]:
    words = f"--dataset_name {inputs.posters} --resolution {resolution} --vae {inputs.autoencoder}"
    return f"data_scripts/precompute_latents.py {words} --output_dir {latents}".split()
