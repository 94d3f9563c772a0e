"""The pictures in the posters: small scenes in a few tones, printed in two colours.

A scene is drawn as tones (an "L" image, 0 dark .. 255 light) and then coloured. `plain` posters use one cool monochrome
that no mixture of palette colours gives. `standard` posters use a duotone on softly shaded tones, in the picture's own
colours or in those of the poster. `rich` posters have photographs of the same subjects instead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from data_scripts.posters.brief import pick
from pipelines.common.poster_domain import PICTURE_TINT

DARK, DIM, MID, LIGHT = 78, 112, 150, 190
"""The four tones of a scene."""

DUOTONES = (
    ((18, 34, 66), (236, 222, 196)),
    ((60, 26, 40), (250, 214, 178)),
    ((14, 56, 58), (232, 236, 206)),
    ((44, 30, 74), (246, 196, 190)),
    ((30, 30, 34), (232, 228, 220)),
)
"""Darkest and lightest colours of `standard` pictures that are not printed in the poster's own colours."""

Painter = Callable[[ImageDraw.ImageDraw, float, float, np.random.Generator], None]


def paint_scene(subject: str, size: tuple[int, int], seed: int, *, shaded: bool) -> Image.Image:
    """Paint the scene as an RGB image of `size` (width, height in px); `shaded` adds gradients and a duotone."""
    rng = np.random.default_rng(seed)
    tones = _flat_tones(subject, size, rng)
    if not shaded:
        return _ink(tones, [(0, 0, 0), tuple(255 * tint for tint in PICTURE_TINT)])
    return _ink(_shaded(tones), pick(rng, DUOTONES))


def scene_tones(subject: str, size: tuple[int, int], seed: int) -> Image.Image:
    """Return the shaded scene before it is coloured: "L" image of `size` (width, height in px), 0 dark .. 255 light."""
    return _shaded(_flat_tones(subject, size, np.random.default_rng(seed)))


def _flat_tones(subject: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    width, height = size
    tones = Image.new("L", size, LIGHT)
    SCENES[subject](ImageDraw.Draw(tones), float(width), float(height), rng)
    return tones


def _shaded(tones: Image.Image) -> Image.Image:
    """Make the tones lighter at the top and darker at the bottom, and stretch them to the whole range."""
    fall = Image.linear_gradient("L").resize(tones.size)  # 0 at the top .. 255 at the bottom
    blended = Image.blend(tones, Image.eval(fall, lambda v: 255 - v), 0.22)
    return Image.eval(blended, lambda v: int(min(max((v - 60) * 1.7, 0), 255)))


def _ink(tones: Image.Image, ends: object) -> Image.Image:
    """Map tones linearly to colours between the two `ends`, clipped to 0..255."""
    dark, light = np.asarray(ends, dtype=np.float64)
    table = np.clip(dark + (light - dark) * np.arange(256)[:, None] / 255, 0, 255).round().astype(np.uint8)
    return Image.merge("RGB", [tones.point(table[:, channel].tolist()) for channel in range(3)])


def _landscape(draw: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    """A sun, two mountains, a plain."""
    sun = pick(rng, (0.25, 0.75))
    draw.ellipse((w * sun - 0.14 * h, 0.12 * h, w * sun + 0.14 * h, 0.4 * h), fill=235)
    peak = 1.0 - sun
    draw.polygon([(w * (peak - 0.55), h), (w * peak, 0.25 * h), (w * (peak + 0.55), h)], fill=MID)
    draw.polygon([(w * (sun - 0.4), h), (w * sun, 0.55 * h), (w * (sun + 0.45), h)], fill=DIM)
    draw.rectangle((0, 0.82 * h, w, h), fill=DARK)


def _seascape(draw: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    """A low sun over the sea, and a sail."""
    sun = pick(rng, (0.3, 0.7))
    draw.ellipse((w * sun - 0.2 * h, 0.3 * h, w * sun + 0.2 * h, 0.7 * h), fill=235)
    draw.rectangle((0, 0.55 * h, w, h), fill=DIM)
    draw.rectangle((0, 0.8 * h, w, h), fill=DARK)
    mast = w * (1 - sun)
    draw.polygon([(mast, 0.2 * h), (mast, 0.7 * h), (mast + 0.22 * w, 0.7 * h)], fill=DARK)


def _portrait(draw: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    """Head and shoulders before a plain background."""
    draw.rectangle((0, 0, w, h), fill=MID)
    cx, radius = w / 2, min(0.2 * h, 0.3 * w)
    draw.ellipse((cx - 1.35 * radius, 0.1 * h, cx + 1.35 * radius, 0.1 * h + 2.7 * radius), fill=DARK)
    draw.ellipse((cx - 2.2 * radius, 0.64 * h, cx + 2.2 * radius, 1.4 * h), fill=DARK)
    draw.rectangle((cx - 0.4 * radius, 0.5 * h, cx + 0.4 * radius, 0.7 * h), fill=LIGHT)
    draw.ellipse((cx - radius, 0.2 * h, cx + radius, 0.2 * h + 2.2 * radius), fill=225)


def _still_life(draw: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    """A bottle and a fruit on a table."""
    draw.rectangle((0, 0, w, h), fill=MID)
    draw.rectangle((0, 0.72 * h, w, h), fill=LIGHT)
    side = pick(rng, (0.3, 0.7))
    cx = w * side
    half = 0.12 * h
    draw.rectangle((cx - half, 0.42 * h, cx + half, 0.85 * h), fill=DARK)
    draw.rectangle((cx - 0.4 * half, 0.15 * h, cx + 0.4 * half, 0.45 * h), fill=DARK)
    fruit, radius = w * (1 - side), 0.18 * h
    draw.ellipse((fruit - radius, 0.88 * h - 2 * radius, fruit + radius, 0.88 * h), fill=DIM)


def _city(draw: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    """A skyline in two rows."""
    for fill, low, high in ((MID, 0.2, 0.5), (DARK, 0.45, 0.8)):
        for k in range(4):
            top = low + (high - low) * pick(rng, (0.0, 0.5, 1.0))
            draw.rectangle((w * k / 4, top * h, w * (k + 1) / 4 - 1, h), fill=fill)


SCENES: dict[str, Painter] = {
    "landscape": _landscape,
    "seascape": _seascape,
    "portrait": _portrait,
    "still_life": _still_life,
    "city": _city,
}
SUBJECTS = tuple(SCENES)
