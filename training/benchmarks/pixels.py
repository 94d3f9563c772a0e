"""Train the usual baseline for own images: DDPM in pixels, as in Diffusers' example train_unconditional.py.

    python training/benchmarks/pixels.py --train_data_dir my_images --minutes 10 --output_dir runs/ddpm_pixels
    python training/evaluate.py --model runs/ddpm_pixels --dataset_name my_images --split train --num_inference_steps 50

U-Net, noise schedule, loss, optimizer, learning rate schedule and EMA are those of the example, with a smaller network
and without captions or classes. Unless it is given, the number of steps is chosen from the speed of the first steps,
so that the cosine schedule ends with the time. It saves no checkpoints and does not validate. It serves as a baseline
for the recipes that training/benchmarks/recipes.py compares.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.devices import get_device
from training.core.batches import fetch
from training.core.draws import SampleKey
from training.core.files import write_json
from training.core.options import option
from training.core.parsing import parse_config
from training.data.images import DataConfig, ImageDataset, load_split

PROBED_STEPS = 5
LONGEST_WARMUP, WARMUP_SHARE = 500, 0.05


@dataclass
class PixelBaselineConfig(DataConfig):
    """Flags of this script."""

    output_dir: str = option("runs/ddpm_pixels")
    """Folder for the pipeline"""
    minutes: float = option(10.0, above=0)
    """Minutes of training"""
    max_train_steps: int = option(0, at_least=0)
    """Number of steps, whatever time they take; 0 takes as many as fit into the minutes"""
    learning_rate: float = option(1e-4, above=0)
    """Peak learning rate"""
    train_batch_size: int = option(16, at_least=1)
    """Number of images in each step"""
    block_out_channels: list[int] = option([64, 64, 128, 192])
    """Channels of the levels of the U-Net, multiples of 32; the default has about as many parameters as the U-Net that
    Halftone chooses for 64 pixels"""
    seed: int = option(0, at_least=0)
    """Random seed"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not self.source:
            raise UserError("--train_data_dir is missing; give a folder of images")
        if wrong := [width for width in self.block_out_channels if width % 32 or width <= 0]:
            raise UserError(f"--block_out_channels: {wrong[0]} is not a multiple of 32")


def main(argv: Sequence[str] | None = None) -> int:
    from diffusers import DDIMPipeline, DDIMScheduler

    config = parse_config(PixelBaselineConfig, argv, description=__doc__)
    unet, steps = train(config)
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)
    DDIMPipeline(unet, scheduler).save_pretrained(config.output_dir)
    parameters = sum(p.numel() for p in unet.parameters())
    write_json(Path(config.output_dir) / "baseline.json", {"steps": steps, "parameters": parameters})
    print(json.dumps({"steps": steps, "parameters": parameters}))
    return 0


def train(config: PixelBaselineConfig) -> tuple[torch.nn.Module, int]:
    """Train for `config.minutes`; return the U-Net with the EMA weights, and the number of steps."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    device = get_device()
    torch.manual_seed(config.seed)
    unet = build_unet(config).to(device)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    data = ImageDataset(load_split(config, "train", config.seed), config, captions=False)
    images = batches(data, min(config.train_batch_size, len(data)), config.seed)
    schedule = None
    started, total, step = time.monotonic(), 0, 0
    while not total or step < total:
        clean = next(images).to(device)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=device)
        loss = F.mse_loss(unet(noise_scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        step += 1
        elapsed = time.monotonic() - started
        if step == PROBED_STEPS:
            total = max(step + 1, config.max_train_steps or round(config.minutes * 60 / (elapsed / step)))
            warmup = min(LONGEST_WARMUP, round(WARMUP_SHARE * total))
            schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=total - step)
        elif schedule is not None:
            schedule.step()
        if elapsed > 60 * config.minutes and step > PROBED_STEPS and not config.max_train_steps:
            break
    ema.copy_to(unet.parameters())
    return unet, step


def build_unet(config: PixelBaselineConfig) -> torch.nn.Module:
    """Build the U-Net of the example: two blocks at each level, and attention at the last but one."""
    from diffusers import UNet2DModel

    levels = len(config.block_out_channels)
    attends = [level == levels - 2 for level in range(levels)]
    return UNet2DModel(
        sample_size=config.resolution,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=tuple("AttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        up_block_types=tuple("AttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
    )


def batches(data: ImageDataset, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of images (B 3 R R in [-1, 1]) for ever, in another order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    epoch = 0
    while True:
        order = torch.randperm(len(data), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield fetch(data, [SampleKey(row, epoch) for row in order[start : start + size]])["pixel_values"]
        epoch += 1


if __name__ == "__main__":
    entry_point(main)
