"""Synthetic photographs for `rich` posters: small rendered scenes with light, haze and depth.

The light of a scene is rendered with SAMPLES² samples per pixel, averaged, and passed through a camera model. A scene
is always rendered for a poster of 256 px and then averaged down, so that it looks the same at every resolution.
Exponentials and Fourier transforms are rounded differently on different processors. So unlike other posters, `rich`
posters may differ between machines by one step of a pixel's value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from data_scripts.posters.photographs.indoor_shots import portrait, still_life
from data_scripts.posters.photographs.optics import camera
from data_scripts.posters.photographs.outdoor_shots import city, landscape, seascape

PIXELS_PER_UNIT = 16
"""Rendered pixels per grid unit: those of a poster of 256 px."""
SAMPLES = 2
"""Samples per rendered pixel, along each side."""

Shot = Callable[[tuple[int, int], np.random.Generator], np.ndarray]

SHOTS: dict[str, Shot] = {
    "landscape": landscape,
    "seascape": seascape,
    "portrait": portrait,
    "still_life": still_life,
    "city": city,
}
"""For each scene of `pictures.SCENES`, a function from (H, W) and a random generator to the light of its photograph."""


def take_photograph(subject: str, size: tuple[int, int], pixels_per_unit: float, seed: int) -> Image.Image:
    """Return a photograph as an RGB image of `size` (width, height in px), for a poster with `pixels_per_unit`."""
    rng = np.random.default_rng(seed)
    width, height = (max(round(side * PIXELS_PER_UNIT / pixels_per_unit), 1) for side in size)
    light = SHOTS[subject]((height * SAMPLES, width * SAMPLES), rng)
    averaged = light.reshape(height, SAMPLES, width, SAMPLES, 3).mean(axis=(1, 3))
    return camera(averaged, rng).resize(size, Image.Resampling.BOX)
