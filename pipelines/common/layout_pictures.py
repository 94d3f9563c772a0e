"""Draws feature tensors as images for people to look at.

A feature tensor (F_Tensor) is here a NumPy array 4 × H × W: text mask {0, 1}, image mask {0, 1}, colour role (a class
id), hierarchy [0, 1].

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

ROLE_COLORS = np.array(
    [(246, 243, 236), (171, 180, 191), (59, 111, 182), (127, 196, 189), (224, 159, 62), (43, 43, 46)], dtype=np.float32
)
"""Colours in which the roles are drawn: background, surface, primary, secondary, accent, ink."""
TEXT_COLOR, IMAGE_COLOR = (209, 73, 91), (46, 125, 50)
HIERARCHY_COLORS = np.array([(255, 255, 255), (253, 212, 158), (239, 101, 72), (127, 0, 0)], dtype=np.float32)
ERROR_COLORS = {"color_role": (59, 111, 182), "image_mask": IMAGE_COLOR, "text_mask": TEXT_COLOR}
TINT = 0.45  # share of the mask's colour in a tinted pixel
DIMMED = 0.35  # share of white in a dimmed pixel


def draw_features(features: np.ndarray) -> Image.Image:
    """Draw the colour roles as flat colours, with text tinted red and pictures tinted green; H × W."""
    pixels = ROLE_COLORS[features[2].astype(int)]
    return _to_pil(_tinted(pixels, features))


def draw_hierarchy(features: np.ndarray) -> Image.Image:
    """Draw how strongly each pixel leads the eye, from white (not at all) to dark red (most strongly); H × W."""
    place = np.clip(features[3], 0, 1) * (len(HIERARCHY_COLORS) - 1)
    lower = np.minimum(place.astype(int), len(HIERARCHY_COLORS) - 2)
    share = (place - lower)[..., None]
    return _to_pil((1 - share) * HIERARCHY_COLORS[lower] + share * HIERARCHY_COLORS[lower + 1])


def draw_overlay(image: Image.Image, features: np.ndarray) -> Image.Image:
    """Draw the poster dimmed, with its text tinted and framed red and its pictures green, in the poster's size."""
    height, width = features.shape[1:]
    if image.size != (width, height):
        raise ValueError(f"the image has {image.size} pixels (width, height), but its features have {(width, height)}")
    poster = np.asarray(image.convert("RGB"), dtype=np.float32)
    pixels = _tinted((1 - DIMMED) * poster + DIMMED * 255, features)
    line = max(1, round(min(width, height) / 128))
    for mask, color in ((features[0], TEXT_COLOR), (features[1], IMAGE_COLOR)):
        pixels[_edges(mask > 0.5, line)] = color
    return _to_pil(pixels)


def draw_errors(predicted: np.ndarray, true: np.ndarray) -> tuple[Image.Image, float]:
    """Draw where two feature tensors differ: text in red, pictures in green, colour role in blue, hierarchy in grey.

    Returns:
        The image, and the share of pixels with a wrong class.
    """
    difference = np.abs(predicted[3] - true[3])[..., None]
    pixels = 255 - np.clip(difference, 0, 1) * np.full((*predicted.shape[1:], 3), 200, dtype=np.float32)
    wrong = {
        "color_role": predicted[2] != true[2],
        "image_mask": predicted[1] != true[1],
        "text_mask": predicted[0] != true[0],
    }
    for name, where in wrong.items():
        pixels[where] = ERROR_COLORS[name]
    return _to_pil(pixels), float(np.logical_or.reduce(list(wrong.values())).mean())


def _tinted(pixels: np.ndarray, features: np.ndarray) -> np.ndarray:
    pixels = pixels.copy()
    for mask, color in ((features[0] > 0.5, TEXT_COLOR), (features[1] > 0.5, IMAGE_COLOR)):
        pixels[mask] = (1 - TINT) * pixels[mask] + TINT * np.array(color, dtype=np.float32)
    return pixels


def _edges(mask: np.ndarray, line: int) -> np.ndarray:
    """Return the pixels of `mask` that are at most `line` pixels from its edge."""
    height, width = mask.shape
    padded = np.pad(mask, line)
    shifts = ((0, line), (2 * line, line), (line, 0), (line, 2 * line))
    inside = np.logical_and.reduce([padded[y : y + height, x : x + width] for y, x in shifts])
    return mask & ~inside


def _to_pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))
