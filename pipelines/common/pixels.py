"""Converts PIL images to pixel tensors for networks.

Shapes: C channels, H W pixels.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pixel_channels(*images: Image.Image) -> Tensor:
    """Return the channels of 8-bit images of one size, one image after another, as C H W, uint8."""
    channels_last = np.concatenate([np.atleast_3d(np.array(image, dtype=np.uint8)) for image in images], axis=2)
    return torch.from_numpy(channels_last).movedim(2, 0)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB, as training does: on white if transparent, scaled if 16-bit or float grey."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_gray(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layers).convert("RGB")


def _from_deep_gray(image: Image.Image) -> Image.Image:
    """Convert 16-bit, 32-bit or float grey to RGB. Pillow's `convert` clips them at 255, which turns scans white."""
    values = np.asarray(image)
    brightest = values.max(initial=0)
    if image.mode == "F":
        scale = 255.0 if brightest <= 1 else 255 / 65535 if brightest > 255 else 1.0
    else:
        scale = 255 / 65535 if image.mode.startswith("I;16") or brightest > 255 else 1.0
    gray = np.empty(values.shape, np.uint8)
    for place, row in zip(gray, values):  # row by row, because float64 takes eight bytes per pixel
        place[:] = np.clip(row.astype(np.float64) * scale + 0.5, 0, 255)
    return Image.fromarray(gray).convert("RGB")
