"""A patch discriminator (Isola et al. 2017, "PatchGAN") and its training.

It uses group instead of batch normalization, so that samples stay independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.core.draws import Draws
from training.core.stage import Batch, Phase
from training.objectives.functional import hinge_discriminator_loss


class PatchDiscriminator(nn.Module):
    """Maps images B C H W in [-1, 1] to one score per patch, B 1 h w; above 0 means real.

    Args:
        channels: channels of the first layer; they double with each layer, up to eight times this number.
        layers: number of downsamplings by 2.
        image_channels: channels of the images.
    """

    def __init__(self, channels: int = 32, layers: int = 3, image_channels: int = 3):
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers):
            wider = channels * min(2**layer, 8)
            parts += [
                nn.Conv2d(width, wider, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(min(8, wider), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        parts.append(nn.Conv2d(width, 1, 3, padding=1))
        self.layers = nn.Sequential(*parts)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@contextmanager
def parameters_fixed(module: nn.Module) -> Iterator[None]:
    """Context in which gradients flow through `module` but not to its parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class DiscriminatorPhase(Phase):
    """Trains the discriminator to distinguish images from reconstructions.

    The autoencoder is not trained here, but by the adversarial term of its own phase.

    Args:
        reconstruct: (images B 3 H W in [-1, 1], draws) → reconstructions as in the phase of the autoencoder.
        start: step from which the discriminator is trained.
        learning_rate: None uses that of the run.
    """

    name = "discriminator"

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        reconstruct: Callable[[Tensor, Draws], Tensor],
        start: int,
        learning_rate: float | None,
    ):
        super().__init__()
        self.discriminator = discriminator
        self.learning_rate = learning_rate
        self._start, self._reconstruct = start, reconstruct

    def first_step(self, total_steps: int) -> int:
        return self._start

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self._reconstruct(batch["pixel_values"], draws)
        real_score, fake_score = self.discriminator(batch["pixel_values"]), self.discriminator(fake)
        loss = hinge_discriminator_loss(real_score, fake_score)
        return loss, {"real": real_score.detach().mean(), "fake": fake_score.detach().mean()}
