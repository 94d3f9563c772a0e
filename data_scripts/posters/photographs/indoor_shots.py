"""Indoor photographs: a portrait and a still life, made of solids under one soft lamp. See `optics` for the legend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_scripts.posters.brief import pick
from data_scripts.posters.photographs.optics import (
    Direction,
    Surface,
    ball,
    blurred,
    bokeh,
    color,
    fractal,
    glint,
    mixed,
    sampled,
    shaded,
    smooth_step,
    view,
)

BACKDROPS = (color(70, 82, 84), color(150, 128, 104), color(38, 46, 66), color(176, 176, 170), color(96, 62, 50))
LAMPS_BEHIND = (color(255, 190, 110), color(255, 230, 190), color(150, 190, 230))
SKINS = (color(232, 184, 154), color(214, 158, 122), color(164, 110, 78), color(112, 72, 50), color(236, 196, 170))
HAIR = (color(38, 28, 24), color(74, 48, 30), color(150, 108, 62), color(24, 22, 24), color(150, 146, 142))
CLOTHES = (
    color(46, 58, 84), color(120, 40, 42), color(224, 220, 210), color(44, 46, 46), color(90, 104, 76),
    color(196, 150, 60),
)  # fmt: skip
BLUSH, LIPS = np.array([1.0, 0.62, 0.58], dtype=np.float32), np.array([0.72, 0.32, 0.32], dtype=np.float32)
EYE_WHITE, EYE_DARK = color(190, 184, 178), color(22, 16, 14)

WALLS = (color(58, 66, 70), color(120, 104, 84), color(40, 38, 44), color(168, 164, 154), color(64, 82, 78))
TABLES = (color(134, 90, 56), color(88, 60, 44), color(206, 198, 184), color(110, 112, 112))
FRUIT = (
    (color(196, 40, 36), color(214, 150, 60)),
    (color(228, 122, 24), color(238, 150, 40)),
    (color(126, 160, 48), color(180, 190, 80)),
    (color(236, 196, 50), color(226, 176, 40)),
    (color(96, 34, 60), color(130, 50, 70)),
)
"""The two colours of the skin of each fruit: apple, orange, green apple, lemon, plum."""
BOTTLES = (
    (color(24, 52, 34), True),
    (color(66, 34, 18), True),
    (color(196, 190, 178), False),
    (color(60, 92, 120), False),
    (color(150, 74, 48), False),
)
"""Colour of each bottle, and whether it is made of glass."""


@dataclass(frozen=True)
class Sitter:
    """The person in a portrait: colours, the lamp, and the samples' coordinates (H × W), with the face at x = 0."""

    skin: np.ndarray
    hair: np.ndarray
    cloth: np.ndarray
    long_hair: bool
    lamp: Direction
    x: np.ndarray
    y: np.ndarray


def portrait(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Render head and shoulders in soft light from one side, before a wall or a room far out of focus."""
    x, y = view(shape)
    side = pick(rng, (-1.0, 1.0))
    light = _backdrop(rng, x, y, side)
    center = pick(rng, (-0.35, 0.0, 0.35)) * max(float(x[0, -1]) - 0.6, 0)
    lamp = (0.62 * side, -0.45, 0.64)
    long_hair = rng.random() < 0.5
    sitter = Sitter(pick(rng, SKINS), pick(rng, HAIR), pick(rng, CLOTHES), long_hair, lamp, x - center, y)
    strands = fractal(rng, shape, 1.2, stretch=0.15)
    light = _bust(light, rng, sitter, strands)
    light = _face(light, rng, sitter)
    return blurred(_hair(light, sitter, strands), 0.004 * shape[0])


def _backdrop(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
    wall = pick(rng, BACKDROPS)
    light = mixed(1.3 * wall, 0.35 * wall, smooth_step(-1.2, 1.2, 0.4 * y - 0.7 * side * x))
    light = light * np.clip(1 + 0.25 * fractal(rng, x.shape, 3.2), 0.3, 2)[..., None]
    light = light + bokeh(rng, x.shape, LAMPS_BEHIND, pick(rng, (0, 0, 5, 9)))
    return blurred(light, 0.02 * x.shape[0])


def _bust(light: np.ndarray, rng: np.random.Generator, sitter: Sitter, strands: np.ndarray) -> np.ndarray:
    """Draw long hair on the shoulders, the neck, and clothes with a neckline."""
    x, y, lamp = sitter.x, sitter.y, sitter.lamp
    if sitter.long_hair:
        back = ball(x, y, (0, 0.16), (0.46, 0.74))
        light = mixed(light, 0.7 * sitter.hair * _lit(back, lamp, 0.3, 0.15 * strands), back[3])
    neck = ball(x, y, (0, 0.42), (0.2, 0.5))
    under_chin = -0.65 * np.exp(-((x / 0.25) ** 2 + ((y - 0.36) / 0.13) ** 2))
    light = mixed(light, 0.8 * sitter.skin * _lit(neck, lamp, 0.2, under_chin), neck[3])
    folds = 0.1 * fractal(rng, x.shape, 2.4, stretch=0.5)
    neckline = smooth_step(0.0, 0.03, y - 0.54 + 1.6 * x**2)
    for center, radii in (((0, 0.9), (0.42, 0.46)), ((0, 1.12), (0.88, 0.64))):
        body = ball(x, y, center, radii)
        light = mixed(light, sitter.cloth * _lit(body, lamp, 0.22, folds), body[3] * neckline)
    return light


def _face(light: np.ndarray, rng: np.random.Generator, sitter: Sitter) -> np.ndarray:
    """Draw the head with ears, and the features of the face as soft bumps of the lit surface."""
    x, y, lamp, skin = sitter.x, sitter.y, sitter.lamp, sitter.skin
    turned = rng.uniform(
        -0.09, 0.09
    )  # the features move but not the outline, which looks like a slight turn of the head

    def spot(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return np.exp(-(((x - turned - cx) / rx) ** 2 + ((y - cy) / ry) ** 2))

    def pair(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return spot(-cx, cy, rx, ry) + spot(cx, cy, rx, ry)

    for ear_x in (-0.33, 0.33):
        ear = ball(x, y, (ear_x, -0.04), (0.06, 0.11))
        light = mixed(light, 0.7 * skin * _lit(ear, lamp, 0.2, 0.0), ear[3])
    sockets, cheeks = pair(0.135, -0.08, 0.075, 0.05), pair(0.165, 0.085, 0.1, 0.075)
    relief = 0.045 * spot(0, 0.02, 0.055, 0.12) + 0.035 * spot(0, 0.1, 0.07, 0.04) - 0.045 * sockets
    relief += 0.03 * cheeks + 0.025 * spot(0, 0.2, 0.1, 0.035) + 0.03 * spot(0, 0.33, 0.1, 0.07)
    head = _bumped(ball(x, y, (0, -0.12), (0.34 - 0.1 * smooth_step(0.0, 0.42, y), 0.5)), relief)
    tone = skin * (1 + 0.04 * fractal(rng, x.shape, 1.6))[..., None]
    for pigment, share in (
        (skin * BLUSH, 0.35 * cheeks),
        (skin * LIPS, 0.8 * spot(0, 0.205, 0.1, 0.028)),
        (0.25 * skin, 0.6 * spot(0, 0.2, 0.085, 0.007) + 0.45 * pair(0.03, 0.125, 0.018, 0.01)),
        (0.45 * skin, 0.45 * sockets),
        (sitter.hair, 0.75 * pair(0.135, -0.165, 0.09, 0.018)),
        (EYE_WHITE, 0.6 * pair(0.135, -0.075, 0.045, 0.017)),
        (EYE_DARK, np.clip(pair(0.135, -0.077, 0.02, 0.021) + 0.7 * pair(0.135, -0.098, 0.055, 0.01), 0, 1)),
    ):
        tone = mixed(tone, pigment, share)
    shine = glint(head, (0.6 * lamp[0], 0.6 * lamp[1], 0.85), 22)
    return mixed(light, tone * _lit(head, lamp, 0.2, 0.0) + 0.05 * shine[..., None], head[3])


def _hair(light: np.ndarray, sitter: Sitter, strands: np.ndarray) -> np.ndarray:
    """Draw the hair on the head down to the temples, with the parting on the side of the lamp."""
    x, y, lamp = sitter.x, sitter.y, sitter.lamp
    volume = ball(x, y, (0, -0.2), (0.39, 0.47))
    parting = math.copysign(0.14, lamp[0])
    fringe = smooth_step(0.0, 0.14, -0.3 - y - 0.5 * (x - parting) ** 2 + 0.03 * strands)
    temples = smooth_step(0.27, 0.35, np.abs(x) + 0.01 * strands) * smooth_step(0.12, -0.02, y)
    lit = sitter.hair * _lit(volume, lamp, 0.3, 0.18 * strands)
    return mixed(light, lit, volume[3] * np.maximum(fringe, temples))


@dataclass(frozen=True)
class Table:
    """The place of a still life: the coordinates of the samples (H × W), and the direction of the lamp."""

    x: np.ndarray
    y: np.ndarray
    lamp: Direction


def still_life(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Render a bottle or a vase and fruit on a table, with a pool of light from one side, soft shadows and a glint."""
    x, y = view(shape)
    half_width, side = float(x[0, -1]), pick(rng, (-1.0, 1.0))
    lamp = (0.66 * side, -0.5, 0.56)
    table = Table(x, y, lamp)
    edge = rng.uniform(0.1, 0.3)
    light = _table(rng, x, y, edge, side)
    place = (side * rng.uniform(0.1, 0.35) * half_width, edge + 0.32)
    light = _bottle(light, rng, table, place)
    for _ in range(pick(rng, (1, 2, 3))):
        place = (-side * rng.uniform(-0.15, 0.75) * half_width, edge + rng.uniform(0.38, 0.6))
        light = _fruit(light, rng, table, place)
    return light


def _table(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, edge: float, side: float) -> np.ndarray:
    """Draw a wall with a pool of light, and before it a table top in perspective with its far edge at y = `edge`."""
    pool = 0.25 + 1.1 * np.exp(-(((x - 0.5 * side) / 0.9) ** 2 + ((y + 0.3) / 0.9) ** 2))
    light = pick(rng, WALLS) * (pool * (1 + 0.08 * fractal(rng, x.shape, 2.2)))[..., None]
    depth = 1 / np.maximum(y - edge + 0.35, 0.05)
    grain = sampled(fractal(rng, (128, 128), 1.8, stretch=6), 10 * x * depth + 60, 30 * depth)
    falloff = 0.55 + 0.5 * np.exp(-(((x - 0.6 * side) / 1.1) ** 2))
    top = pick(rng, TABLES) * (falloff * (1 + 0.16 * grain))[..., None]
    return blurred(mixed(light, top, smooth_step(-0.012, 0.012, y - edge)), 0.012 * x.shape[0])


def _fruit(light: np.ndarray, rng: np.random.Generator, table: Table, place: tuple[float, float]) -> np.ndarray:
    """Draw a round fruit at `place`."""
    x, y, lamp = table.x, table.y, table.lamp
    radius = rng.uniform(0.2, 0.3)
    cx, cy = place[0], place[1] - radius
    skin, other = pick(rng, FRUIT)
    light = _with_shadow(light, x, y, place, radius, lamp)
    body = ball(x, y, (cx, cy), (radius * rng.uniform(0.98, 1.1), radius))
    tone = mixed(skin, other, smooth_step(-1.2, 1.4, fractal(rng, x.shape, 2.6) + 1.2 * body[1]))
    tone = tone * (1 + 0.08 * fractal(rng, x.shape, 0.8))[..., None]
    from_table = 0.35 * np.clip(body[1], 0, 1)[..., None] * TABLES[0]
    lit = tone * (1.15 * _lit(body, lamp, 0.14, 0.0) + from_table) + 0.45 * glint(body, lamp, 40)[..., None]
    stalk = np.exp(-(((x - cx) / (0.2 * radius)) ** 2 + ((y - cy + 0.82 * radius) / (0.09 * radius)) ** 2))
    return mixed(light, lit * (1 - 0.75 * stalk)[..., None], body[3])


def _bottle(light: np.ndarray, rng: np.random.Generator, table: Table, place: tuple[float, float]) -> np.ndarray:
    """Draw a bottle or vase at `place`: a solid of revolution with horizontal normals; glass is transparent."""
    x, y, lamp = table.x, table.y, table.lamp
    hue, glass = pick(rng, BOTTLES)
    width, tall, neck = rng.uniform(0.17, 0.24), rng.uniform(0.85, 1.1), pick(rng, (0.32, 0.45))
    up = (place[1] - y) / tall
    profile = width * (neck + (1 - neck) * smooth_step(0.74, 0.52, up)) * (1 - 0.08 * smooth_step(0.1, 0.0, up))
    if not glass:
        profile = profile * (1 + 0.25 * np.sin(4.2 * np.clip(up, 0, 1)))
    nx = (x - place[0]) / profile
    nz = np.sqrt(np.clip(1 - nx**2, 0, 1))
    covers = smooth_step(1.03, 0.95, np.abs(nx)) * smooth_step(-0.01, 0.01, up + 0.05 * nz - 0.05)
    body = (nx, np.zeros_like(nx), nz, covers * smooth_step(1.01, 0.99, up))
    light = _with_shadow(light, x, y, place, width, lamp)
    lit = hue * _lit(body, (lamp[0], 0.0, lamp[2] + 0.3), 0.15, 0.05 * fractal(rng, x.shape, 1.8))
    if glass:
        lit = 0.5 * lit + mixed(3 * light * hue, 0.4 * hue, nx**2)
    strip = np.exp(-(((nx - 0.85 * lamp[0]) / 0.1) ** 2)) * smooth_step(0.05, 0.15, up) * (0.7 if glass else 0.18)
    return mixed(light, lit + strip[..., None], body[3])


def _with_shadow(
    light: np.ndarray, x: np.ndarray, y: np.ndarray, place: tuple[float, float], radius: float, lamp: Direction
) -> np.ndarray:
    """Darken the table around an object at `place`: most where it touches, softly on the side away from the lamp."""
    cx, foot = place
    along = (x - cx + math.copysign(0.55 * radius, lamp[0])) / (1.35 * radius)
    soft = np.exp(-1.3 * (along**2 + ((y - foot + 0.04) / (0.26 * radius)) ** 2))
    contact = np.exp(-(((x - cx) / (0.75 * radius)) ** 2 + ((y - foot) / (0.1 * radius + 0.01)) ** 2))
    return light * (1 - np.clip(0.65 * soft + 0.5 * contact, 0, 0.9))[..., None]


def _lit(surface: Surface, lamp: Direction, fill: float, unevenness: np.ndarray | float) -> np.ndarray:
    """Return the factor by which the light on `surface` multiplies a colour (H × W × 1)."""
    return (shaded(surface, lamp, fill) * (1 + unevenness))[..., None]


def _bumped(surface: Surface, relief: np.ndarray) -> Surface:
    """Tilt the normals of `surface` by the slopes of `relief` (H × W, in half heights)."""
    slope_y, slope_x = np.gradient(relief, 2 / relief.shape[0])
    return surface[0] - 1.1 * slope_x, 0.8 * surface[1] - 1.1 * slope_y, surface[2], surface[3]
