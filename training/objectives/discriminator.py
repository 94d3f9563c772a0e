"""A patch discriminator (Isola et al. 2017, "PatchGAN"), with group normalization so that samples stay independent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Images B 3 H W in [-1, 1] → one number per patch, B 1 h w; above 0 is 'real'.

    Args:
        channels: of the first layer; they double with each layer up to eight times.
        layers: downsamplings by 2.
    """

    def __init__(self, channels: int = 32, layers: int = 3):
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
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
    """Inside, gradients flow through `module` but not to its parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
