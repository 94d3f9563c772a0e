"""Placeholder photographs for `rich` posters: small scenes with real light, air and depth, computed, not collected.

A subject is rendered as light at SAMPLES² samples to a pixel, averaged, and taken by a camera. It is always rendered
for a poster of 256 px and then averaged down, so that one scene is one photograph at every resolution. Exponentials and
Fourier transforms round differently on different processors: unlike other posters, `rich` ones may differ from one kind
of machine to another by a step of a pixel's value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from data_scripts.posters.photographs.indoor_shots import portrait, still_life
from data_scripts.posters.photographs.optics import camera
from data_scripts.posters.photographs.outdoor_shots import city, landscape, seascape

PIXELS_PER_UNIT = 16
"""A photograph's own pixels to a grid unit: those of a poster at 256 px."""
SAMPLES = 2
"""Samples to one of its pixels, along each side."""

Shot = Callable[[tuple[int, int], np.random.Generator], np.ndarray]

SHOTS: dict[str, Shot] = {
    "landscape": landscape,
    "seascape": seascape,
    "portrait": portrait,
    "still_life": still_life,
    "city": city,
}
"""What each scene of `pictures.SCENES` looks like through a lens: (H, W) and a generator -> light."""


def take_photograph(subject: str, size: tuple[int, int], pixels_per_unit: float, seed: int) -> Image.Image:
    """The photograph as an RGB picture of `size` (width, height in px), on a poster with `pixels_per_unit`."""
    rng = np.random.default_rng(seed)
    width, height = (max(round(side * PIXELS_PER_UNIT / pixels_per_unit), 1) for side in size)
    light = SHOTS[subject]((height * SAMPLES, width * SAMPLES), rng)
    averaged = light.reshape(height, SAMPLES, width, SAMPLES, 3).mean(axis=(1, 3))
    return camera(averaged, rng).resize(size, Image.Resampling.BOX)
