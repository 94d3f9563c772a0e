"""Colours for pixel classes: a class id has the same colour in every image.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

COLOR_BLIND_SAFE = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
"""Eight colours that people with any kind of colour vision can distinguish (Okabe and Ito 2008)."""
UNLABELLED, UNLABELLED_COLOR = 255, (176, 176, 176)
GOLDEN_SHARE = 0.618034  # share of the colour circle between two ids in sequence, so that their hues lie far apart


def class_color(class_id: int) -> tuple[int, int, int]:
    """Return the RGB colour of a class id (0 to 255).

    The first eight colours suit any kind of colour vision; telling the others apart needs full colour vision.
    """
    if class_id == UNLABELLED:
        return UNLABELLED_COLOR
    if class_id < len(COLOR_BLIND_SAFE):
        return COLOR_BLIND_SAFE[class_id]
    red, green, blue = colorsys.hsv_to_rgb(class_id * GOLDEN_SHARE % 1, 0.55, (0.95, 0.65)[class_id % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def class_ids_to_pil(ids: np.ndarray) -> Image.Image:
    """Convert class ids (H W, 0 to 255) to a palette image: its pixel values are the ids, shown in their colours."""
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette([channel for class_id in range(256) for channel in class_color(class_id)])
    return image
