"""Measure time and memory of the joint model of images and captions; started by run.py, once for each measurement.

`--side generation` compares caption generation with a cache of keys and values against a loop of full-sequence forward
passes, for the default network. `--side memory` measures a training step of one preset at one batch size.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.devices import bf16_is_faster, get_device, peak_memory, synchronize
from pipelines.tools.resources import shipped_path
from training.benchmarks.children import peak_mb
from training.core.batches import to_device
from training.core.draws import Draws
from training.core.files import write_atomically
from training.core.options import Options, option
from training.core.parsing import parse_config
from training.data.tokenization import CaptionTokens, train_tokenizer
from training.engine.launch import keep_freed_memory, threads_per_process

PRESETS = shipped_path("configs/experiments/image_caption")
WORDS = 7996  # with four special tokens, the size of the default vocabulary
CAPTION_WORDS = 12


@dataclass
class CaptionBenchConfig(Options):
    """Flags of this script."""

    side: str = option("generation", choices=("generation", "memory"))
    """What to measure: generation or memory"""
    preset: str = "default"
    """For memory: name of a preset in configs/experiments/image_caption"""
    batch_size: int = option(8, at_least=0)
    """Number of captions generated at once, or of pairs in a training step; 0 only builds the model and optimizer"""
    tokens: int = 100
    """For generation: number of tokens in each caption"""
    steps: int = option(4, at_least=2)
    """For memory: number of training steps; all but the first are timed"""
    repetitions: int = 3
    """For generation: number of timed repetitions of each method"""
    device: str | None = None
    """Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"""
    output: str = ""
    """File for the results (JSON, required)"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not (PRESETS / f"{self.preset}.yaml").is_file():
            raise UserError(f"--preset {self.preset} does not exist; choose the name of a file in {PRESETS}")


@torch.no_grad()
def loop_of_forwards(model: Any, latents: Tensor, tokens: int, never: Sequence[int]) -> Tensor:
    """Generate greedy captions of exactly `tokens` tokens, with a forward pass of the whole sequence for each token.

    Args:
        latents: B D.
        never: token ids that are never generated.

    Returns:
        Token ids after `<START>`, B `tokens`.
    """
    ids = torch.full((len(latents), 1), model.config.start_token_id, device=latents.device)
    for _ in range(tokens):
        logits = model.caption_logits(latents, ids)[:, -1].float()
        logits[:, list(never)] = float("-inf")
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, 1:]


def measure_generation(config: CaptionBenchConfig) -> dict[str, float]:
    """Measure the seconds of both methods, their ratio, and the fraction of equal tokens."""
    from pipelines.models.image_caption_model import ImageCaptionModel

    device = get_device(config.device)
    torch.manual_seed(0)
    model = ImageCaptionModel(max_length=config.tokens + 1).eval().to(device)
    latents = torch.randn(config.batch_size, model.config.latent_size).to(device)
    settings = model.config
    special = (settings.pad_token_id, settings.start_token_id, settings.unknown_token_id, settings.end_token_id)
    sides: dict[str, Callable[[], Tensor]] = {
        # With this `min_length`, which includes <START>, no caption ends before the last token.
        "cached": lambda: model.generate_captions(latents, min_length=config.tokens + 1),
        "full": lambda: loop_of_forwards(model, latents, config.tokens, special),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    captions = {name: side() for name, side in sides.items()}  # also the warm-up
    synchronize(device)
    for _ in range(config.repetitions):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return {
        "cached_seconds": statistics.median(seconds["cached"]),
        "full_seconds": statistics.median(seconds["full"]),
        "speedup": statistics.median(full / cached for full, cached in zip(seconds["full"], seconds["cached"])),
        "equal_tokens": float((captions["cached"] == captions["full"]).float().mean()),
    }


def measure_memory(config: CaptionBenchConfig) -> dict[str, float]:
    """Measure peak memory (MB = 10⁶ bytes, resident or on the GPU) and pairs per second of training both phases."""
    from training.train_image_caption import Config, ImageCaptionPhase

    device = get_device(config.device)
    settings = parse_config(Config, ["--config", str(PRESETS / f"{config.preset}.yaml"), "--dataset_name", "unused"])
    step, parameters = _training_step(settings, ImageCaptionPhase, config.batch_size, device)
    seconds = []
    for number in range(config.steps if config.batch_size else 0):
        started = time.perf_counter()
        step(number)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    on_gpu = peak_memory(device)
    peak = peak_mb() if on_gpu is None else on_gpu / 1e6
    rate = config.batch_size / statistics.median(seconds[1:]) if seconds else 0.0
    return {"peak_mb": peak, "pairs_per_second": rate, "parameters": parameters}


def _training_step(settings: Any, phase_class: Any, batch_size: int, device: Any) -> tuple[Callable[[int], None], int]:
    """Return a function that trains model and prior for one step as the loop does, EMA included; and the number of
    trained parameters."""
    from pipelines.models.latent_prior import LatentPriorModel
    from training.engine.ema import EMA
    from training.models.image_caption import build_model
    from training.models.latent_prior import LatentPriorPhase

    torch.manual_seed(0)
    words = [f"word{i}" for i in range(WORDS)]
    length = settings.model.max_length
    tokenizer = train_tokenizer([" ".join(words)], model_max_length=length)
    phase = phase_class(build_model(settings.model, settings.resolution, tokenizer), settings, 1.0)
    prior = LatentPriorModel(settings.model.latent_size, settings.prior.hidden_size, settings.prior.num_layers)
    phases = [phase.to(device), LatentPriorPhase(prior, settings.prior, phase.image_latents).to(device)]
    parameters = [[p for p in one.parameters() if p.requires_grad] for one in phases]
    ema = EMA({"model": phase.model, "prior": prior}, settings.ema_decay, settings.ema_update_every)
    optimizers = [torch.optim.AdamW(own, fused=True) for own in parameters]
    for own, optimizer in zip(parameters, optimizers):
        if not batch_size:
            for p in own:
                p.grad = torch.zeros_like(p)
            optimizer.step()
    captions = [" ".join(words[(i * 31 + k) % WORDS] for k in range(CAPTION_WORDS)) for i in range(batch_size)]
    pixels = torch.randn(batch_size, 3, settings.resolution, settings.resolution, device=device).clamp(-1, 1)
    tokens = CaptionTokens(tokenizer, length, "longest")

    def step(number: int) -> None:
        batch = {"pixel_values": pixels, **to_device(tokens(captions), device)}
        for one, own, optimizer in zip(phases, parameters, optimizers):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_faster()):
                loss, _ = one(batch, Draws(0, number, range(batch_size), device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own, settings.max_grad_norm)
            optimizer.step()
        ema.update(number + 1)

    return step, sum(p.numel() for own in parameters for p in own)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(CaptionBenchConfig, argv, description=__doc__)
    if not config.output:
        raise UserError("--output is missing; run training/benchmarks/run.py (make bench), which sets it")
    torch.set_num_threads(threads_per_process())
    keep_freed_memory()
    metrics = measure_generation(config) if config.side == "generation" else measure_memory(config)
    write_atomically(Path(config.output), json.dumps(metrics) + "\n")


if __name__ == "__main__":
    entry_point(main)
