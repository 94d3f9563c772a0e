"""Estimates the time and the disk space of trainings that have not begun, for `--dry_run`.

Two training steps of each network are timed with random inputs, so that nothing has to be made for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.tools.devices import get_device, synchronize
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
    """

    name: str
    steps: int
    batch: int
    build: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]
    images: int
    checkpoints: int = 2

    def measure(self) -> tuple[float, int]:
        """Return (seconds of the whole training, bytes on disk)."""
        network, loss = self.build()
        device = get_device()
        network.to(device)
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        loss().backward()  # allocates memory and chooses kernels
        synchronize(device)
        started = time.perf_counter()
        for _ in range(TIMED_STEPS):
            loss().backward()
        synchronize(device)
        seconds = (time.perf_counter() - started) / TIMED_STEPS
        return OVERHEAD * seconds * self.steps, CHECKPOINT_FACTOR * weights * self.checkpoints


def lines(trainings: Sequence[Training]) -> list[str]:
    """Return a line about each training, and one about all of them; an empty list without trainings."""
    if not trainings:
        return []
    found, seconds, size = [], 0.0, 0
    for training in trainings:
        own_seconds, own_size = training.measure()
        seconds, size = seconds + own_seconds, size + own_size
        epochs = training.steps * training.batch / max(1, training.images)
        found.append(
            f"{training.name}: {training.steps:,} steps of {training.batch} images ({epochs:,.0f} epochs), about "
            f"{_duration(own_seconds)} on this machine"
        )
    total = f"in total about {_duration(seconds)}, and about {size / 2**20:,.0f} MiB on the disk"
    return [*found, total]


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


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' if minutes > 1 else ''}" if minutes < 120 else f"{minutes / 60:.1f} hours"
