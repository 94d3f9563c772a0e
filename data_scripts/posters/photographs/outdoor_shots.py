"""Outdoor photographs: mountains, the sea, a city at the water. See `optics` for the legend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_scripts.posters.brief import pick
from data_scripts.posters.photographs.optics import blurred, color, fractal, mixed, sampled, smooth_step, view


@dataclass(frozen=True)
class Daylight:
    """Colours of the sky overhead, of the sky at the horizon and of the sun, and the strength of the sun."""

    zenith: np.ndarray
    horizon: np.ndarray
    sun: np.ndarray
    strength: float
    low_sun: bool


HOURS = (
    Daylight(color(52, 100, 178), color(188, 208, 226), color(255, 244, 224), 2.4, False),
    Daylight(color(72, 92, 148), color(246, 196, 140), color(255, 190, 110), 2.0, True),
    Daylight(color(58, 62, 110), color(230, 150, 124), color(255, 160, 100), 1.6, True),
    Daylight(color(122, 138, 152), color(206, 210, 212), color(255, 250, 240), 0.9, False),
)
"""Noon, the golden hour, dusk, and an overcast day."""

GRASS = (color(66, 84, 44), color(58, 72, 50), color(96, 94, 52))
ROCK, SNOW = color(104, 96, 88), color(236, 238, 242)
DEEP_WATER, HEADLAND = color(14, 42, 52), color(62, 70, 74)

CONCRETE, LAMPLIGHT = color(62, 66, 76), np.array([1.0, 0.7, 0.36], dtype=np.float32)
CITY_HOURS = (
    (color(24, 34, 66), color(226, 138, 96), 0.35),
    (color(10, 14, 30), color(64, 60, 84), 0.4),
    (color(96, 128, 168), color(214, 216, 214), 0.05),
    (color(40, 62, 110), color(246, 190, 150), 0.2),
)
"""Colours of the sky overhead and at the horizon, and fraction of lit windows: dusk, night, a hazy day, sunrise."""
MOST_TOWERS = 64


def landscape(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Render mountains seen from a meadow: a height field in perspective, lit from the side, paler with distance."""
    height, width = shape
    hour, side = pick(rng, HOURS), pick(rng, (-1.0, 1.0))
    horizon = rng.uniform(-0.25, 0.05)
    sky = _sky(shape, rng, hour, horizon, -0.8 * side)
    depths = np.geomspace(0.25, 9.0, 220, dtype=np.float32)[:, None]  # D × 1
    across = np.linspace(-width / height, width / height, width, dtype=np.float32)[None, :]
    heights, lit = _terrain(rng, depths, across, hour, side)
    # From front to back, the highest line so far hides everything below it.
    skyline = np.minimum.accumulate(horizon + (0.55 - heights) / depths, axis=0)  # D × W, as y
    rows = np.linspace(-1, 1, height, dtype=np.float32)
    hidden = skyline[:, None, :] <= rows[None, :, None]  # D × H × W
    first = hidden.argmax(axis=0)
    return np.where(hidden.max(axis=0)[..., None], lit[first, np.arange(width)[None, :]], sky)


def _terrain(
    rng: np.random.Generator, depths: np.ndarray, across: np.ndarray, hour: Daylight, side: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return heights (D × W) and lit colours (D × W × 3) of the ground at D distances in W directions."""
    ground = fractal(rng, (256, 256), 3.2)
    steepness = (np.gradient(ground, axis=1), np.gradient(ground, axis=0))
    column, row = 11 * across * depths + 100, 11 * depths + 7.3
    relief = smooth_step(0.8, 7.0, depths) * 1.15 + 0.06  # flat at the viewer's feet
    heights = (sampled(ground, column, row) + 0.4) * relief * rng.uniform(0.8, 1.2)
    heights = heights + np.abs(sampled(ground[::-1], 3 * column, 3 * row)) * relief * 0.06
    east, south = (sampled(slope, column, row) for slope in steepness)
    upright = 1 / np.sqrt(1 + 81 * (east**2 + south**2))
    sunlight = np.clip((0.45 + 5 * side * east) * upright, 0.0, 1.2)
    rough = sampled(fractal(rng, (256, 256), 1.0), 9 * column, 25 * row)
    ground_color = mixed(pick(rng, GRASS), ROCK, smooth_step(0.15, 0.7, heights + 0.1 * rough))
    ground_color = mixed(ground_color, SNOW, smooth_step(0.8, 1.3, heights + 0.1 * rough))
    light = sunlight[..., None] * hour.sun * hour.strength + 0.35 * hour.horizon
    lit = ground_color * (1 + 0.25 * rough)[..., None] * light
    air = 1 - np.exp(-depths * rng.uniform(0.06, 0.14))
    return heights, mixed(lit, 0.95 * hour.horizon, np.broadcast_to(air, heights.shape))


def _sky(shape: tuple[int, int], rng: np.random.Generator, hour: Daylight, horizon: float, sun_x: float) -> np.ndarray:
    """Render a whole view of sky, brighter towards the horizon and the sun, with clouds on a plane in perspective."""
    x, y = view(shape)
    up = np.clip((horizon - y) / (1 + horizon), 0, 1)
    glow = np.exp(-(((x - sun_x) / 0.9) ** 2 + ((y - horizon + 0.35) / 0.5) ** 2))[..., None]
    light = mixed(hour.horizon, hour.zenith, up**0.6) + 0.35 * hour.strength * glow * hour.sun
    distance = 0.35 / np.maximum(horizon - y + 0.12, 0.05)
    clouds = sampled(fractal(rng, (128, 128), 2.6), x * distance * 30 + 40, distance * 55)
    cover = smooth_step(0.1, 1.6, clouds) * smooth_step(0.0, 0.25, up) * pick(rng, (0.3, 0.7, 0.9))
    return mixed(light, 1.15 * hour.horizon + 0.3 * glow * hour.sun, cover)


def seascape(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Render open water with waves that mirror the sky and glitter below the sun, and land on one side."""
    hour = pick(rng, HOURS)
    horizon, sun_x = rng.uniform(-0.2, 0.2), rng.uniform(-0.6, 0.6)
    x, y = view(shape)
    sky = _sky(shape, rng, hour, horizon, sun_x)
    if hour.low_sun:
        distance = np.hypot(x - sun_x, y - horizon + rng.uniform(0.1, 0.3))
        sky = sky + (5 * np.exp(-((distance / 0.11) ** 4)) + 0.6 * np.exp(-5 * distance))[..., None] * hour.sun
    ridge = 0.16 * sampled(fractal(rng, (1, 256), 2.4), 40 * x + 128, np.zeros_like(x))
    land = horizon - np.clip(ridge + 0.3 * pick(rng, (-1.0, 1.0)) * x - 0.12, 0, 0.3)
    sky = mixed(sky, mixed(HEADLAND, hour.horizon, 0.55), smooth_step(-0.01, 0.01, y - land))
    water = _water(rng, x - sun_x, x, np.maximum(y - horizon, 1e-3), hour)
    return mixed(sky, water, smooth_step(-0.004, 0.008, y - horizon))


def _water(
    rng: np.random.Generator, from_sun: np.ndarray, x: np.ndarray, down: np.ndarray, hour: Daylight
) -> np.ndarray:
    """Render the sea at `down` below the horizon; the flatter the viewing angle, the more it mirrors the sky."""
    depth = 1 / down
    waves = fractal(rng, (256, 256), 1.9, stretch=2.5)
    swell = sampled(waves, 22 * x * depth + 100, 26 * depth) + 0.7 * sampled(waves.T, 60 * x * depth, 75 * depth + 9)
    slope = swell * np.clip(0.16 + 0.25 * down, 0, 0.4)
    mirrored = mixed(hour.horizon, hour.zenith, np.clip(0.15 + 0.5 * down + 0.6 * slope, 0, 1))
    share = np.clip(0.06 + 0.9 * np.exp(-2.2 * down) + 0.25 * slope, 0.03, 1)
    light = mixed(DEEP_WATER * (0.4 + hour.strength / 3), mirrored, share)
    path = np.exp(-((from_sun / (0.12 + 0.25 * down)) ** 2))
    glitter = smooth_step(0.5, 2.2, swell + 0.8 * path) * path * (0.35 + 0.65 * np.exp(-down))
    light = light + (2.2 * hour.strength * glitter)[..., None] * hour.sun
    foam = 0.5 * smooth_step(1.5, 2.6, swell) * smooth_step(0.2, 0.9, down)
    return mixed(light, 0.9 * hour.horizon, foam)


def city(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Render a skyline over water: rows of towers in the haze with lit windows, mirrored with ripples."""
    _, y = view(shape)
    above, horizon, lit_share = pick(rng, CITY_HOURS)
    shore = rng.uniform(0.35, 0.6)
    light = mixed(horizon, above, np.clip((shore - y) / (1 + shore), 0, 1) ** 0.7)
    light = light * (1 + 0.14 * fractal(rng, shape, 2.8, stretch=3))[..., None]
    for near in (0.0, 1 / 3, 2 / 3, 1.0):
        light = _towers(light, rng, shore, horizon, near, lit_share)
    light = light + 0.8 * blurred(np.clip(light - 0.6, 0, None), 0.02 * shape[0])  # lamps bloom
    return mixed(light, _mirrored(light, rng, shore) + 0.04 * above, smooth_step(-0.006, 0.006, y - shore))


def _towers(
    light: np.ndarray, rng: np.random.Generator, shore: float, haze: np.ndarray, near: float, lit_share: float
) -> np.ndarray:
    """Draw one row of towers over `light`; `near` ranges from 0 (almost hidden by haze) to 1."""
    x, y = view((light.shape[0], light.shape[1]))
    half_width = float(x[0, -1])
    edges = np.cumsum(rng.uniform(0.06, 0.2, MOST_TOWERS) * (0.7 + 0.6 * near)) - half_width - rng.uniform(0, 0.3)
    crowd = np.exp(-(((edges - rng.uniform(-0.5, 0.5) * half_width) / (0.8 * half_width)) ** 2))
    tall = rng.uniform(0.05, 0.25, MOST_TOWERS)
    tall += (0.95 - 0.55 * near) * crowd * rng.uniform(0.1, 1.0, MOST_TOWERS) ** 1.5
    tower = np.clip(np.searchsorted(edges, x[0]), 0, MOST_TOWERS - 1)  # W: number of the tower at each x
    inward = edges[tower] - x[0]
    tops = (shore - tall)[tower]
    panes, lamps = _windows(rng, tower, inward, y - tops, near, lit_share)
    face = rng.uniform(0.5, 1.0, MOST_TOWERS)[tower] * (0.8 + 2 * inward)
    wall = CONCRETE * (0.3 + 0.5 * float(haze.mean())) * (face * (1 + 0.2 * smooth_step(0, 1, shore - y)))[..., None]
    wall = mixed(wall, 0.35 * haze, 0.5 * panes) * (lamps == 0)[..., None] + 1.1 * lamps[..., None] * LAMPLIGHT
    wall = mixed(wall, haze, 0.75 * (1 - near) ** 1.2)
    return mixed(light, wall, y > tops)


def _windows(
    rng: np.random.Generator, tower: np.ndarray, inward: np.ndarray, below: np.ndarray, near: float, lit_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask of window panes (H × W) and the brightness of each (0: not lit).

    Args:
        rng: random generator.
        tower: number of the tower at each x (W).
        inward: distance of each x from the right edge of its tower (W).
        below: distance below the top of the tower (H × W).
        near: see `_towers`.
        lit_share: fraction of lit windows.
    """
    across, down = inward / (0.02 + 0.006 * near), below / (0.03 + 0.01 * near)
    column, story = np.floor(across).astype(int), np.floor(down).astype(int)
    panes = (np.abs(across % 1 - 0.5) < 0.33) & (np.abs(down % 1 - 0.5) < 0.3)
    dice = rng.random((64, 64), dtype=np.float32)
    drawn = dice[(7 * story + 13 * tower) % 64, (5 * column + 29 * tower + 3 * story) % 64]
    bright = 0.15 + 0.9 * dice[column % 64, tower % 64] ** 2
    return panes, np.where(panes & (drawn < lit_share), bright, 0.0)


def _mirrored(light: np.ndarray, rng: np.random.Generator, shore: float) -> np.ndarray:
    """Return `light` mirrored below the shore, darker, and distorted by ripples that grow towards the viewer."""
    height, width, _ = light.shape
    ripple = fractal(rng, (height, width), 1.6, stretch=4)
    rows = np.arange(height, dtype=np.float32)[:, None]
    line = (shore + 1) / 2 * height
    row = np.clip(2 * line - rows + ripple * (0.02 * height + 0.06 * (rows - line)), 0, line - 1).astype(int)
    column = np.clip(np.arange(width)[None, :] + 0.008 * height * ripple, 0, width - 1).astype(int)
    water = light[row, column]
    smeared = 0.55 * water + 0.25 * np.roll(water, 2, axis=0) + 0.2 * np.roll(water, -3, axis=0)
    return smeared * (0.62 + 0.06 * ripple)[..., None]
