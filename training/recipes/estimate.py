"""Estimates the time and the disk space of trainings that have not begun, for `--dry_run` and `--time_budget`.

Two training steps of each network are timed with random inputs, so that nothing has to be made for it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.tools.devices import get_device, synchronize
from training.engine.threads import main_thread_on_its_core
from training.models.autoencoder import AutoencoderModelConfig, build_autoencoder
from training.models.denoiser import build_denoiser

TIMED_STEPS = 2
# A step also draws noise, updates the optimizer and the EMA weights and encodes captions. A run also validates, shows
# previews and saves.
OVERHEAD = 1.3
# Bytes of a checkpoint for each byte of weights: weights, EMA weights, two moments, and the pipeline.
CHECKPOINT_FACTOR = 5


@dataclass
class Training:
    """A training that has not begun.

    Attributes:
        build: makes the network and a function that returns its loss for random inputs.
        checkpoints: number of checkpoints that are kept: the newest and the best.
        limit: seconds that it may take; 0 for no limit.
    """

    name: str
    steps: int
    batch: int
    build: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]
    images: int
    checkpoints: int = 2

    limit: float = 0.0

    @functools.cached_property
    def _measured(self) -> tuple[float, int]:
        """(seconds of a step, bytes of the weights)"""
        device = get_device()
        devices = [device] if device.type == "cuda" else []
        # The run that may follow draws the same numbers as without this measurement.
        with torch.random.fork_rng(devices), main_thread_on_its_core(device):
            network, loss = self.build()
            network.to(device)
            weights = sum(p.numel() * p.element_size() for p in network.parameters())
            loss().backward()  # allocates memory and chooses kernels
            synchronize(device)
            started = time.perf_counter()
            for _ in range(TIMED_STEPS):
                loss().backward()
            synchronize(device)
            return (time.perf_counter() - started) / TIMED_STEPS, weights

    @property
    def step_seconds(self) -> float:
        """Estimated seconds of a step, with what comes with it."""
        return OVERHEAD * self._measured[0]

    @property
    def seconds(self) -> float:
        """Estimated seconds of the whole training."""
        own = self.step_seconds * self.steps
        return min(own, self.limit) if self.limit else own

    @property
    def bytes(self) -> int:
        """Estimated bytes on the disk."""
        return CHECKPOINT_FACTOR * self._measured[1] * self.checkpoints


def lines(trainings: Sequence[Training], limit: float = 0.0) -> list[str]:
    """Return a line about each training, and one about all of them; an empty list without trainings.

    Args:
        limit: seconds that all of them may take together; 0 for no limit. The last one gets what the others leave.
    """
    if not trainings:
        return []
    found, total = [], 0.0
    if limit:
        trainings[-1].limit = max(1.0, limit - sum(training.seconds for training in trainings[:-1]))
    for training in trainings:
        seconds, step = training.seconds, training.step_seconds
        total += seconds
        steps = min(training.steps, round(seconds / step))
        shortened = "about " if steps < training.steps else ""
        epochs = steps * training.batch / max(1, training.images)
        found.append(
            f"{training.name}: {shortened}{steps:,} steps of {training.batch} images ({epochs:,.0f} epochs), about "
            f"{duration(seconds)} on this machine"
        )
    size = sum(training.bytes for training in trainings)
    end = f"in total about {duration(total)} on this machine, until {finish(total)}"
    return [*found, f"{end}, and about {size / 2**20:,.0f} MiB on the disk"]


def finish(seconds: float) -> str:
    """Return the time of day after these seconds, with the date unless it is today."""
    now = datetime.now()
    then = now + timedelta(seconds=seconds)
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%H:%M} on {then:%Y-%m-%d}"


def autoencoder(
    name: str, config: AutoencoderModelConfig, resolution: int, steps: int, batch: int, images: int
) -> Training:
    """Return the training of an autoencoder."""

    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        network = build_autoencoder(config, resolution)
        shape = (batch, 3, resolution, resolution)

        def loss() -> Tensor:
            pixels = torch.rand(shape, device=network.device) * 2 - 1
            encoded = network.encode(pixels)
            latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
            return (network.decode(latents).sample - pixels).abs().mean()

        return network, loss

    return Training(name, steps, batch, build, images)


def diffusion(name: str, config: Any, steps: int, latents: tuple[int, int], num_classes: int, images: int) -> Training:
    """Return the training of a diffusion model.

    Args:
        config: that of train_latent_diffusion.py.
        latents: channels, and cells per side.
    """
    channels, cells = latents
    batch, with_text = config.train_batch_size, config.with_captions
    width = config.text_encoder.hidden_size if with_text else None

    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        network = build_denoiser(config, channels, cells, width, num_classes)

        def loss() -> Tensor:
            device = next(network.parameters()).device
            noisy = torch.randn((batch, channels, cells, cells), device=device)
            times = torch.randint(0, 1000, (batch,), device=device)
            states = torch.randn((batch, config.text_encoder.max_length, width), device=device) if width else None
            labels = torch.zeros(batch, dtype=torch.long, device=device) if num_classes else None
            with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                predicted = network(noisy, times, encoder_hidden_states=states, class_labels=labels).sample
            return predicted.square().mean()

        return network, loss

    return Training(name, steps, batch, build, images)


def duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' if minutes > 1 else ''}" if minutes < 120 else f"{minutes / 60:.1f} hours"
