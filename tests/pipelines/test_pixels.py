"""PIL images as tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.common.pixels import pixel_channels, to_rgb


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_channels_come_first_and_images_one_after_another():
    color, gray = noise(4, 6, 3), noise(4, 6, seed=1)
    pixels = pixel_channels(Image.fromarray(color), Image.fromarray(gray))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (4, 4, 6)
    for channel in range(3):
        assert np.array_equal(pixels[channel], color[..., channel])
    assert np.array_equal(pixels[3], gray)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (1, 1), (0, 255)), (0, 0, 0)),
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        (Image.new("I;16", (1, 1), 65535), (255, 255, 255)),
        (Image.new("F", (1, 1), 0.5), (128, 128, 128)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_every_mode_becomes_rgb(image, expected):
    assert to_rgb(image).getpixel((0, 0)) == expected
