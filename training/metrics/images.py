"""Similarity of images (PSNR and SSIM), and conversion of tensors to images; pure functions.

images: B C H W in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.common.pixels import MODES, image_channels, straight, to_mode

WINDOW = 11
WINDOW_SIGMA = 1.5


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio in dB of values clamped to [-1, 1] (peak 2); 100 for equal images. B."""
    error = (images.float().clamp(-1, 1) - references.float().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Compute structural similarity (Wang et al. 2004): Gaussian window 11×11, sigma 1.5, K1 = 0.01, K2 = 0.03. B.

    Raises:
        ValueError: the images are smaller than the window.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}×{WINDOW} pixels, these are {tuple(images.shape)}")
    x, y = images.float().clamp(-1, 1), references.float().clamp(-1, 1)
    offsets = torch.arange(WINDOW, dtype=torch.float32, device=x.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * WINDOW_SIGMA**2))
    window = window / window.sum()
    channels = x.shape[1]

    def blur(value: Tensor) -> Tensor:
        value = F.conv2d(value, window.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(value, window.reshape(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.flatten(1).mean(1)


def to_pil(image: Tensor) -> Image.Image:
    """Convert one image, C H W in [-1, 1], to a Pillow image; values outside this range are clamped.

    It is RGB, grey for one channel, and RGBA for four, of which the colours are blended with white.
    """
    pixels = ((straight(image.detach().float().clamp(-1, 1)) + 1) * 127.5).round().to(torch.uint8)
    channels_last = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(channels_last[..., 0] if len(pixels) == 1 else channels_last)


def pixels_of(images: Sequence[Image.Image], channels: int = 3) -> Tensor:
    """Convert images of equal size to a tensor as networks take it: N C R R in [-1, 1], with C 1 (grey), 3 or 4."""
    pixels = [image_channels(to_mode(image, MODES[channels])) for image in images]
    return torch.stack(pixels).float() / 127.5 - 1
