"""ICC profiles whose effect is known from a formula, written tag by tag, and that effect in NumPy (float64)."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image, ImageCms

WHITE_D65, WHITE_D50 = (0.3127, 0.3290), (0.34567, 0.35850)
SRGB_PRIMARIES = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
P3_PRIMARIES = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def srgb_profile() -> bytes:
    """Return a profile of sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def p3_profile() -> bytes:
    """Return the profile of Display P3: that of sRGB with other primaries."""
    tags = _tags(srgb_profile())
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), (_to_d50() @ _xyz(P3_PRIMARIES)).T, strict=True):
        tags[name] = b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in column)
    return _profile(tags)


def grey_profile(gamma: float) -> bytes:
    """Return a profile of grey values whose luminance is their power `gamma`."""
    tags = _tags(srgb_profile())
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return _profile({name: tags[name] for name in (b"desc", b"cprt", b"wtpt")} | {b"kTRC": curve}, space=b"GRAY")


def ink_profile() -> bytes:
    """Return a profile of CMYK in which the lightness L* falls linearly with the amount of any ink, without colour."""
    identity = bytes(range(256))
    lightness = b"".join(bytes([255 if node == 0 else 0, 128, 128]) for node in range(16))
    matrix = b"".join(_fixed(value) for value in np.eye(3).ravel())
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + 4 * identity + lightness + 3 * identity
    tags = _tags(srgb_profile())
    kept = {name: tags[name] for name in (b"desc", b"cprt", b"wtpt")}
    return _profile(kept | {b"A2B0": table}, space=b"CMYK", connection=b"Lab ", device=b"scnr")


def p3_to_srgb(pixels: np.ndarray) -> np.ndarray:
    """Return Display P3 pixels (… 3, uint8) in sRGB, as float64 from 0 to 255."""
    linear = _linear(pixels / 255) @ (np.linalg.inv(_xyz(SRGB_PRIMARIES)) @ _xyz(P3_PRIMARIES)).T
    return 255 * srgb_value(linear)


def srgb_value(linear: np.ndarray) -> np.ndarray:
    """Return the sRGB values in [0, 1] of linear light; light beyond is clipped."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def colorful(width: int = 24, height: int = 16) -> Image.Image:
    """Return an RGB image without symmetry that has saturated colours."""
    pixels = np.random.default_rng(3).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(4, 0).repeat(4, 1))


def _linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Return the matrix from linear RGB, with D65 as its white, to XYZ."""
    columns = np.array([_full(*xy) for xy in primaries]).T
    return columns * np.linalg.solve(columns, _full(*WHITE_D65))


def _to_d50() -> np.ndarray:
    """Return the Bradford adaptation from D65 to D50, in which profiles store their primaries."""
    scale = (BRADFORD @ _full(*WHITE_D50)) / (BRADFORD @ _full(*WHITE_D65))
    return np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD


def _full(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _tags(profile: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack(">I", profile[128:132])
    entries = (struct.unpack(">4sII", profile[132 + 12 * i : 144 + 12 * i]) for i in range(count))
    return {name: profile[start : start + size] for name, start, size in entries}


def _profile(
    tags: dict[bytes, bytes], space: bytes = b"RGB ", connection: bytes = b"XYZ ", device: bytes = b"mntr"
) -> bytes:
    """Return a profile with these tags, and the header of sRGB except for its spaces and its device class."""
    header = bytearray(srgb_profile()[:128])
    header[12:24] = device + space + connection
    table, content = struct.pack(">I", len(tags)), b""
    start = 132 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(content), len(value))
        content += value + b"\0" * (-len(value) % 4)
    header[0:4] = struct.pack(">I", start + len(content))
    return bytes(header) + table + content
