"""A small real stage for testing the loop: a denoising U-Net, and optionally a critic as a second phase.

It is also a script: python tests/support/toy.py --output_dir … (or under torchrun, for several processes).
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from pipelines.tools.cli import UserError, entry_point
from training.core.classes import RowClasses
from training.core.draws import Draws, SampleKey
from training.core.options import option
from training.core.parsing import parse_config
from training.core.stage import Phase, Stage, StageContext
from training.engine.run_config import RunConfig
from training.engine.session import train


@dataclass
class ToyConfig(RunConfig):
    output_dir: str = option("runs/toy", on_resume="free")
    num_samples: int = option(48, on_resume="warn")
    critic: bool = option(False)
    double: bool = option(False)
    data: str = option("", on_resume="free")
    """A folder that the run needs, see `prepare`; nothing in it is read."""
    dropout: float = option(0.1)
    bad_rows: list[int] = option([], on_resume="warn")
    broken_row: int = option(-1, on_resume="free")
    """A row whose image cannot be read, which only the process that draws it notices."""
    bad_validation: bool = option(False, on_resume="free")
    """Whether the validation loss is NaN."""
    slow_seconds: float = option(0.0, on_resume="free")
    """Extra seconds per micro-batch, validation and so on, so that signals can be sent in time."""
    long_part: str = option("", on_resume="free")
    """A part of the run that takes an hour: data, foreign (data that are opened by foreign code), first_step,
    validation, previews, saving (which takes a second), finish."""
    long_seconds: float = option(3600.0, on_resume="free")
    """How long this part takes, if not an hour."""
    signal_at: str = option("", on_resume="free")
    """Where this process sends itself a SIGUSR1: validation, previews or finish."""
    signal_step: int = option(0, on_resume="free")
    """The step (from 1) during which this process sends itself a SIGTERM."""
    signal_rank: int = option(-1, on_resume="free")
    """Rank of the only process that sends itself signals, whose part of the run is long, or that cannot make its share
    of the previews; -1 means all processes."""
    broken_previews: bool = option(False, on_resume="free")
    """Whether an image that previews need cannot be read."""
    denoiser_start: int = option(0, on_resume="warn")
    image_mib: int = option(0, on_resume="free")
    """Memory in MiB that the forward pass takes for each image of a micro-batch."""
    image_mib_step: int = option(0, on_resume="free")
    """The step (from 1) from which on it takes this memory; 0 means always."""
    free_mib: int = option(0, on_resume="free")
    """Memory in MiB that the system lets this process allocate after the stage is built; 0 sets no limit."""
    limited_rank: int = option(-1, on_resume="free")
    """Rank of the only process with this limit; -1 means all processes."""

    def is_signalled(self) -> bool:
        return self.signal_rank in (-1, int(os.environ.get("RANK", "0")))


_filling: list[torch.Tensor] = []


def limit_memory(config: ToyConfig) -> None:
    """Let the system refuse this process more memory than it uses now, beyond `free_mib`."""
    if config.free_mib and config.limited_rank in (-1, int(os.environ.get("RANK", "0"))):
        import resource  # not on Windows

        used = psutil.Process().memory_info().vms
        # Blocks that earlier work left free in the heap would not count: fill them first.
        while True:
            block = torch.empty(64 * 2**20, dtype=torch.uint8)
            if psutil.Process().memory_info().vms > used:
                break
            _filling.append(block)
        del block
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + config.free_mib * 2**20, resource.RLIM_INFINITY))


def last_long(config: ToyConfig, part: str, poll: Callable[[], None] = lambda: None) -> None:
    """Announce a part of the run, and take long if it is the one that should."""
    if config.long_part != part or not config.is_signalled():
        return
    print(f"long part: {part}", flush=True)
    if part == "foreign":
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # it waits for itself, and no signal ends the call
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    deadline = time.monotonic() + (1 if part == "saving" else config.long_seconds)
    while time.monotonic() < deadline:
        time.sleep(0.5 if part in ("validation", "previews") else max(0.0, deadline - time.monotonic()))
        poll()


class ToyData(torch.utils.data.Dataset):
    """Row i is a fixed 8×8 pattern, which an augmentation shifts by a distance that depends on the key."""

    def __init__(self, config: ToyConfig, size: int, augment: bool):
        self.config, self.size, self.augment = config, size, augment

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: SampleKey) -> dict:
        if key.index == self.config.broken_row and self.augment:
            raise UserError(f"row {key.index}: the image is truncated")
        image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(key.index)).tanh()
        if self.augment:
            image = image.roll(key.key % 8, dims=2)
        if key.index in self.config.bad_rows and self.augment:
            image = image * float("nan")
        return {"image": image.double() if self.config.double else image, "index": key.index}

    def classes(self, column: str) -> RowClasses:
        """Return two classes, the same for every column; one row in eight is of the class "rare"."""
        return RowClasses((torch.arange(self.size) % 8 == 0).long(), ["common", "rare"])


class DenoisePhase(Phase):
    name = "denoiser"

    def __init__(self, unet: nn.Module, config: ToyConfig):
        super().__init__()
        self.unet, self.config = unet, config
        self._taken: torch.Tensor | None = None

    def first_step(self, total_steps: int) -> int:
        return self.config.denoiser_start

    def denoised(self, batch, draws: Draws) -> torch.Tensor:
        image = batch["image"]
        noise = draws.normal("noise", image.shape[1:]).to(image.dtype)
        return self.unet(image + 0.5 * noise, torch.zeros(len(image), device=image.device)).sample

    def forward(self, batch, draws):
        time.sleep(self.config.slow_seconds)
        if draws.step >= self.config.image_mib_step - 1:
            self._take(self.config.image_mib * 2**20 * len(batch["image"]))
        last_long(self.config, "first_step")
        if draws.step == self.config.signal_step - 1 and self.config.is_signalled():
            signal.raise_signal(signal.SIGTERM)
        denoised = self.denoised(batch, draws)
        loss = (denoised - batch["image"]).square().mean()
        metrics = {"error": loss.detach()}
        if self.config.critic:
            loss = loss - 0.1 * self.critic(denoised).mean()
        return loss, metrics

    def _take(self, size: int) -> None:
        """Take memory, and keep it: pieces that come and go might not fit between the others under a narrow limit."""
        if self._taken is None or len(self._taken) != size:
            self._taken = None
            self._taken = torch.empty(size, dtype=torch.uint8)


class CriticPhase(Phase):
    name = "critic"

    def __init__(self, critic: nn.Module, denoised):
        super().__init__()
        self.critic, self._denoised = critic, denoised

    def first_step(self, total_steps: int) -> int:
        return 2

    def forward(self, batch, draws):
        with torch.no_grad():
            fake = self._denoised(batch, draws)
        return torch.relu(1 - self.critic(batch["image"])).mean() + torch.relu(1 + self.critic(fake)).mean(), {}


class ToyStage(Stage):
    name = "toy"
    card_template = "autoencoder.md.jinja"

    def __init__(self, config: ToyConfig, context: StageContext = StageContext()):  # noqa: B008 - the default is immutable
        import diffusers

        super().__init__(context)
        self.config = config
        torch.manual_seed(config.seed)
        self.unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            dropout=config.dropout,
            attention_head_dim=8,
        )
        denoise = DenoisePhase(self.unet, config)
        self.phases = [denoise]
        if config.critic:
            critic = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3))
            denoise.borrow(critic=critic)
            self.phases.append(CriticPhase(critic, denoise.denoised))
        if config.double:
            for phase in self.phases:
                phase.double()
        self.ema_of = {"unet": self.unet}
        limit_memory(config)

    def train_data(self):
        last_long(self.config, "data")
        last_long(self.config, "foreign")
        return ToyData(self.config, self.config.num_samples, augment=True)

    def validation_data(self):
        return ToyData(self.config, 7, augment=False)

    def validation_step(self, batch, draws):
        self._wait("validation")
        loss = (self.phases[0].denoised(batch, draws) - batch["image"]).square().flatten(1).mean(1)
        total = loss.sum() * (float("nan") if self.config.bad_validation else 1.0)
        return {"loss": total, "count": torch.tensor(len(loss))}

    def metrics(self, sums):
        return {"val_loss": sums["loss"] / sums["count"]}

    def previews(self, exchange):
        exchange.map_batches(self._make_previews, exchange.num_processes, 1)
        return None

    def _make_previews(self, numbers) -> None:
        self._wait("previews")
        if self.config.broken_previews and self.config.is_signalled():
            raise UserError("an image of the previews is truncated")

    def finish(self, exchange):
        self._wait("finish")

    def pipeline(self):
        import diffusers

        last_long(self.config, "saving")

        return diffusers.DDPMPipeline(self.unet, diffusers.DDPMScheduler())

    def _wait(self, where: str) -> None:
        """Send this process a signal if `signal_at` names this place, and poll as long work does."""
        last_long(self.config, where, self.context.poll if where != "finish" else lambda: None)
        if self.config.signal_at == where and self.config.is_signalled():
            signal.raise_signal(signal.SIGUSR1)
        for _ in range(10):
            time.sleep(self.config.slow_seconds)
            self.context.poll()


def main(argv=None) -> int:
    config = parse_config(ToyConfig, argv)
    return train(ToyStage, config)


if __name__ == "__main__":
    entry_point(main)
