"""Rendering of photographs: natural textures, soft light, haze, blur, and a camera model.

Legend: H W samples; light is linear RGB, H × W × 3 float32, where 1 is white at a normal exposure. x points to the
right and y downwards, both in half heights from the centre of the photograph (y from -1 to 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_scripts.posters.brief import pick

GAMMA = 2.2
READ_NOISE, SHOT_NOISE = 0.006, 0.022
"""Standard deviations of the sensor's noise (0..1): in dark tones, and the additional noise in middle tones."""

Direction = tuple[float, float, float]
"""Direction towards a lamp, of length about 1: x to the right, y downwards, z towards the viewer."""
Surface = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""A solid seen from the front: x, y and z of its normal at each sample, and the fraction of the sample it covers."""


def view(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of every sample of a photograph of `shape` (H, W)."""
    height, width = shape
    y, x = np.mgrid[-1 : 1 : 1j * height, -width / height : width / height : 1j * width].astype(np.float32)
    return x, y


def color(red: int, green: int, blue: int) -> np.ndarray:
    """Convert a colour on a screen (0..255) to linear light: 3 numbers."""
    return (np.array((red, green, blue), dtype=np.float32) / 255) ** GAMMA


def fractal(rng: np.random.Generator, shape: tuple[int, int], slope: float, stretch: float = 1.0) -> np.ndarray:
    """Return noise of mean 0 and deviation 1 with power 1/frequency^slope; natural scenes have slopes of about 2.

    Field, "Relations between the statistics of natural images and the response properties of cortical cells" (1987).

    Args:
        rng: random generator.
        shape: (H, W); the noise can be tiled.
        slope: exponent of the power spectrum.
        stretch: ratio of the width of features to their height.
    """
    fy = np.fft.fftfreq(shape[0])[:, None] * shape[0]
    fx = np.fft.rfftfreq(shape[1])[None, :] * shape[1] * stretch
    amplitude = np.maximum(fy**2 + fx**2, 1.0) ** (-slope / 4)
    amplitude[0, 0] = 0.0
    waves = rng.standard_normal((*amplitude.shape, 2))
    noise = np.fft.irfft2(amplitude * (waves[..., 0] + 1j * waves[..., 1]), s=shape)
    return (noise / max(float(noise.std()), 1e-9)).astype(np.float32)


def sampled(texture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sample a tiling `texture` at real positions x, y (in samples) by bilinear interpolation."""
    height, width = texture.shape
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = (x - left).astype(np.float32), (y - top).astype(np.float32)
    x0, y0 = left % width, top % height
    x1, y1 = (x0 + 1) % width, (y0 + 1) % height
    upper = texture[y0, x0] * (1 - fx) + texture[y0, x1] * fx
    lower = texture[y1, x0] * (1 - fx) + texture[y1, x1] * fx
    return upper * (1 - fy) + lower * fy


def smooth_step(low: float, high: float, values: np.ndarray) -> np.ndarray:
    """Return 0 up to `low`, 1 from `high` on, and a smooth step between them (reversed if low > high)."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mixed(first: np.ndarray, second: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """Mix `share` of `second` into `first`: colours (3) or light (H × W × 3), with one share or a map (H × W)."""
    weight = np.asarray(share, dtype=np.float32)
    weight = weight[..., None] if weight.ndim == 2 else weight
    return (first * (1 - weight) + second * weight).astype(np.float32)


def blurred(light: np.ndarray, radius: float) -> np.ndarray:
    """Apply a Gaussian blur with a standard deviation of `radius` > 0 samples and mirrored borders."""
    height, width, _ = light.shape
    pad_y, pad_x = (min(int(np.ceil(3 * radius)), side - 1) for side in (height, width))
    padded = np.pad(light, ((pad_y, pad_y), (pad_x, pad_x), (0, 0)), mode="reflect")
    squared = np.fft.fftfreq(padded.shape[0])[:, None] ** 2 + np.fft.rfftfreq(padded.shape[1])[None, :] ** 2
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.exp(-2 * (np.pi * radius) ** 2 * squared)[..., None]
    smooth = np.fft.irfft2(spectrum, s=padded.shape[:2], axes=(0, 1))
    return smooth[pad_y : pad_y + height, pad_x : pad_x + width].astype(np.float32)


def bokeh(rng: np.random.Generator, shape: tuple[int, int], hues: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return lights far out of focus: discs, slightly brighter at the rim, that add up where they overlap."""
    x, y = view(shape)
    light = np.zeros((*shape, 3), dtype=np.float32)
    for _ in range(count):
        cx, cy = rng.uniform(float(x[0, 0]), float(x[0, -1])), rng.uniform(-1, 0.6)
        distance = np.hypot(x - cx, y - cy) / rng.uniform(0.06, 0.18)
        disc = smooth_step(1.05, 0.9, distance) * (0.7 + 0.3 * distance**2)
        light += (disc * rng.uniform(0.15, 0.6))[..., None] * pick(rng, hues)
    return light


def ball(x: np.ndarray, y: np.ndarray, center: tuple[float, float], radii: tuple[float | np.ndarray, float]) -> Surface:
    """Return an ellipsoid seen from the front."""
    nx, ny = (x - center[0]) / radii[0], (y - center[1]) / radii[1]
    inside = nx**2 + ny**2
    return nx, ny, np.sqrt(np.clip(1 - inside, 0, 1)), smooth_step(1.02, 0.96, inside)


def shaded(surface: Surface, lamp: Direction, fill: float) -> np.ndarray:
    """Return how brightly a matte surface is lit (H × W).

    The light comes from one broad lamp and, with strength `fill`, from all around, slightly more from above.
    """
    nx, ny, nz, _ = surface
    facing = nx * lamp[0] + ny * lamp[1] + nz * lamp[2]
    return np.clip(0.8 * facing + 0.2, 0, None) ** 1.3 + fill * (0.6 + 0.4 * nz - 0.2 * ny)


def glint(surface: Surface, lamp: Direction, sharpness: float) -> np.ndarray:
    """Return the reflection of the lamp on a slightly glossy surface (H × W in [0, 1])."""
    nx, ny, nz, _ = surface
    return np.clip(nx * lamp[0] + ny * lamp[1] + nz * lamp[2], 0, 1) ** sharpness


def camera(light: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Take an RGB photograph of `light`: exposure, a darker rim, a colour cast, a tone curve and noise."""
    height, width, _ = light.shape
    rows, columns = np.mgrid[-1 : 1 : 1j * height, -1 : 1 : 1j * width]
    rim = 1 - rng.uniform(0.1, 0.3) * (rows**2 + columns**2) / 2
    cast = 1 + rng.uniform(-0.06, 0.06) * np.array([1.0, 0.0, -1.0])
    bright = max(float(np.quantile(light.max(axis=2), 0.97)), 1e-3)
    exposed = np.clip(light * (rng.uniform(0.85, 1.15) / bright) * rim[..., None] * cast, 0, None)
    # Highlights are compressed before they clip. Prints and phones add an S-shaped tone curve.
    tones = np.clip(1.22 * exposed / (1 + 0.25 * exposed), 0, 1) ** (1 / GAMMA)
    tones = mixed(tones, tones * tones * (3 - 2 * tones), rng.uniform(0.3, 0.7))
    noise = rng.standard_normal(light.shape, dtype=np.float32) * (READ_NOISE + SHOT_NOISE * tones * (1.2 - tones))
    return Image.fromarray((np.clip(tones + noise, 0, 1) * 255).round().astype(np.uint8))
