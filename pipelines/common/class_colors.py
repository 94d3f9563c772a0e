"""Colours for classes of pixels: the same class id has the same colour in every picture.

This file is shipped inside published pipelines, so it imports nothing of ours.
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
"""Eight colours that people with any kind of colour vision tell apart (Okabe and Ito 2008)."""
UNLABELLED, UNLABELLED_COLOR = 255, (176, 176, 176)
GOLDEN_SHARE = 0.618034  # of the colour circle: neighbouring ids get hues far apart


def class_color(class_id: int) -> tuple[int, int, int]:
    """RGB of a class id (0 to 255); beyond the first eight, hues that only full colour vision tells apart."""
    if class_id == UNLABELLED:
        return UNLABELLED_COLOR
    if class_id < len(COLOR_BLIND_SAFE):
        return COLOR_BLIND_SAFE[class_id]
    red, green, blue = colorsys.hsv_to_rgb(class_id * GOLDEN_SHARE % 1, 0.55, (0.95, 0.65)[class_id % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def class_ids_to_pil(ids: np.ndarray) -> Image.Image:
    """Class ids (H W, 0 to 255) as a picture with a palette: its pixels are the ids, and it shows their colours."""
    picture = Image.fromarray(ids.astype(np.uint8))
    picture.putpalette([channel for class_id in range(256) for channel in class_color(class_id)])
    return picture
