"""Feature tensors as pictures for people.

An F_Tensor here is 4 × H × W, NumPy: text mask {0, 1}, image mask {0, 1}, colour role (a class id), hierarchy [0, 1].

This file is shipped inside published pipelines, so it imports nothing of ours.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

ROLE_COLORS = np.array(
    [(246, 243, 236), (171, 180, 191), (59, 111, 182), (127, 196, 189), (224, 159, 62), (43, 43, 46)], dtype=np.float32
)
"""How the roles are shown: background, surface, primary, secondary, accent, ink."""
TEXT_COLOR, IMAGE_COLOR = (209, 73, 91), (46, 125, 50)
HIERARCHY_COLORS = np.array([(255, 255, 255), (253, 212, 158), (239, 101, 72), (127, 0, 0)], dtype=np.float32)
ERROR_COLORS = {"color_role": (59, 111, 182), "image_mask": IMAGE_COLOR, "text_mask": TEXT_COLOR}
TINT = 0.45
DIMMED = 0.35


def draw_features(features: np.ndarray) -> Image.Image:
    """Colour roles flat, text tinted red, pictures tinted green; H × W."""
    pixels = ROLE_COLORS[features[2].astype(int)]
    return _picture(_tinted(pixels, features))


def draw_hierarchy(features: np.ndarray) -> Image.Image:
    """What leads the eye, from white (nothing) to dark red (most); H × W."""
    place = np.clip(features[3], 0, 1) * (len(HIERARCHY_COLORS) - 1)
    lower = np.minimum(place.astype(int), len(HIERARCHY_COLORS) - 2)
    share = (place - lower)[..., None]
    return _picture((1 - share) * HIERARCHY_COLORS[lower] + share * HIERARCHY_COLORS[lower + 1])


def draw_overlay(image: Image.Image, features: np.ndarray) -> Image.Image:
    """The poster itself, paled, its text tinted and framed red, its pictures green; of the poster's size."""
    height, width = features.shape[1:]
    if image.size != (width, height):
        raise ValueError(f"the picture is {image.size} pixels and its features are {(width, height)}")
    poster = np.asarray(image.convert("RGB"), dtype=np.float32)
    pixels = _tinted((1 - DIMMED) * poster + DIMMED * 255, features)
    line = max(1, round(min(width, height) / 128))
    for mask, color in ((features[0], TEXT_COLOR), (features[1], IMAGE_COLOR)):
        pixels[_edges(mask > 0.5, line)] = color
    return _picture(pixels)


def draw_errors(predicted: np.ndarray, true: np.ndarray) -> tuple[Image.Image, float]:
    """Where two F_Tensors differ (red text, green pictures, blue colour role, grey hierarchy), and in what share of the
    pixels a class is wrong."""
    difference = np.abs(predicted[3] - true[3])[..., None]
    pixels = 255 - np.clip(difference, 0, 1) * np.full((*predicted.shape[1:], 3), 200, dtype=np.float32)
    wrong = {
        "color_role": predicted[2] != true[2],
        "image_mask": predicted[1] != true[1],
        "text_mask": predicted[0] != true[0],
    }
    for name, where in wrong.items():
        pixels[where] = ERROR_COLORS[name]
    return _picture(pixels), float(np.logical_or.reduce(list(wrong.values())).mean())


def _tinted(pixels: np.ndarray, features: np.ndarray) -> np.ndarray:
    pixels = pixels.copy()
    for mask, color in ((features[0] > 0.5, TEXT_COLOR), (features[1] > 0.5, IMAGE_COLOR)):
        pixels[mask] = (1 - TINT) * pixels[mask] + TINT * np.array(color, dtype=np.float32)
    return pixels


def _edges(mask: np.ndarray, line: int) -> np.ndarray:
    """Pixels of `mask` within `line` of its edge."""
    height, width = mask.shape
    padded = np.pad(mask, line)
    shifts = ((0, line), (2 * line, line), (line, 0), (line, 2 * line))
    inside = np.logical_and.reduce([padded[y : y + height, x : x + width] for y, x in shifts])
    return mask & ~inside


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))
