"""Conversion of any image file to a tensor of a given size: decoding, cropping and flipping (Pillow and NumPy).

H W pixels, R training resolution. Everything random here (crop, flip, choice of a caption) is a pure function of
the sample's key, so that the order of calls, the number of workers and resuming change nothing.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipelines.common.pixels import image_channels, require_finite, to_mode, to_rgb, turned, upright
from pipelines.tools.files import open_image_file
from training.core.draws import mix
from training.data.shards.places import is_place, read_place

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Increase it whenever this file produces other pixels than before: older latent caches are then refused.
TRANSFORM_VERSION = 2
# Versions whose pixels differ only where an image has a colour profile; their latent caches are used, with a warning.
WITHOUT_PROFILES = frozenset({1})
CHANNELS = {"rgb": 3, "rgba": 4, "l": 1}  # of the images of each `--image_mode`
_CONVERSIONS = {mode: functools.partial(to_mode, mode=mode.upper()) for mode in ("rgba", "l")}


class BrokenImage(Exception):
    """An image that cannot be decoded; the message says why."""


class BadSample(Exception):
    """A row that cannot be trained on, because of `reason` in `column`."""

    def __init__(self, column: str, reason: str):
        super().__init__(reason)
        self.column = column


class CropGeometry(NamedTuple):
    """Crop and flip of a training image, shared by the masks and control images of the same sample."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


def uniform(key: int, purpose: str) -> float:
    """Return a number in [0, 1) that is a function of the sample's `key` and of `purpose`."""
    return (mix(key, purpose) >> 10) / (1 << 53)


def flips(key: int) -> bool:
    """Return whether the sample with this key is mirrored (probability 1/2), for pixels and cached latents alike."""
    return uniform(key, "flip") < 0.5


def pick_caption(captions: str | list[str], key: int) -> str:
    """Return the caption, or one of several captions of an image, chosen by `key`."""
    if isinstance(captions, str):
        return captions
    return captions[int(uniform(key, "caption") * len(captions))]


def crop_geometry(
    size: tuple[int, int],
    *,
    center_crop: bool,
    random_flip: bool,
    key: int,
    crop_scale: float = 1.0,
    shape: tuple[int, int] = (1, 1),
) -> CropGeometry:
    """Return a crop of an image of `size` (width, height) with the aspect ratio of `shape` (height, width).

    It is the largest such rectangle, central or at a place chosen by `key`. With `crop_scale` below 1 it is a smaller
    one anywhere inside that one, whose sides are drawn uniformly from [crop_scale, 1] of those of the largest.
    """
    width, height = size
    wide, high = _largest(size, shape)
    # Whole pixels: an offset of half a pixel would blur images that need no resizing.
    across = 0.5 if center_crop else uniform(key, "crop_x")
    down = 0.5 if center_crop else uniform(key, "crop_y")
    left = min(int(across * (width - wide + 1)), width - wide)
    top = min(int(down * (height - high + 1)), height - high)
    if crop_scale < 1:
        share = crop_scale + (1 - crop_scale) * uniform(key, "crop_side")
        inner_wide, inner_high = max(1, round(wide * share)), max(1, round(high * share))
        left += min(int(uniform(key, "crop_inner_x") * (wide - inner_wide + 1)), wide - inner_wide)
        top += min(int(uniform(key, "crop_inner_y") * (high - inner_high + 1)), high - inner_high)
        wide, high = inner_wide, inner_high
    return CropGeometry(left, top, wide, high, random_flip and flips(key))


def _largest(size: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """Return width and height of the largest rectangle in `size` (width, height) with the ratio of `shape` (H, W)."""
    (width, height), (rows, columns) = size, shape
    if width * rows > height * columns:
        return min(width, max(1, round(height * columns / rows))), height
    return width, min(height, max(1, round(width * rows / columns)))


def apply_geometry(
    image: Image.Image, geometry: CropGeometry, size: int | tuple[int, int], resampling: str
) -> Image.Image:
    """Crop, resize to `size` and flip. Masks need `resampling="nearest"`.

    Args:
        size: the side of a square, or (height, width).
    """
    left, top, wide, high, flip = geometry
    box = (left, top, left + wide, top + high)
    height, width = (size, size) if isinstance(size, int) else size
    if (wide, high) == (width, height):
        image = image.crop(box) if image.size != (wide, high) else image
    else:
        # One call crops and resizes, without an intermediate image.
        image = image.resize((width, height), RESAMPLING[resampling], box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def padded_to_square(image: Image.Image) -> Image.Image:
    """Return an RGB, RGBA or grey image in the middle of a white square; one with alpha on transparent white."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new(image.mode, (side, side), "#ffffff00" if image.mode == "RGBA" else "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def open_image(source: Any) -> Image.Image:
    """Open an image without decoding it.

    Args:
        source: a value of `datasets.Image(decode=False)` ({"bytes", "path"}), a path, or an image.

    Raises:
        BrokenImage: the image is missing, or Pillow does not know its format.
    """
    if isinstance(source, Image.Image):
        return source
    if source is None:
        raise BrokenImage("this row has no image")
    data, path = (source.get("bytes"), source.get("path")) if isinstance(source, dict) else (None, source)
    try:
        if data is None and is_place(path):
            data = read_place(path)
        if data is not None:
            return open_image_file(io.BytesIO(data))
        if not path or not Path(path).is_file():
            raise BrokenImage(f"file {path!r} does not exist")
        return open_image_file(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise BrokenImage(f"not a readable image ({_first_line(error)})") from error


def load_rgb(source: Any) -> Image.Image:
    """Decode `source` (see `open_image`) into an upright 8-bit RGB image, in sRGB.

    EXIF orientation is applied, colours are converted from an embedded profile to sRGB, transparent pixels are blended
    with white, 16-bit and float images are scaled to 8 bits, palette and CMYK images are converted, and the first frame
    of an animation is used.

    Raises:
        BrokenImage: the image cannot be decoded completely, or has pixels that are not finite.
    """
    return _loaded(source, to_rgb)


def load_mode(mode: str) -> Callable[[Any], Image.Image]:
    """Return the function that decodes a source as `load_rgb` does, into an image of `--image_mode`.

    Args:
        mode: "rgb", "rgba" (transparency is kept) or "l" (grey).
    """
    return load_rgb if mode == "rgb" else functools.partial(_loaded, convert=_CONVERSIONS[mode])


def load_upright(source: Any) -> Image.Image:
    """Decode `source` (see `open_image`) into an upright image whose pixels keep their values, such as class ids.

    Raises:
        BrokenImage: the image cannot be decoded completely.
    """
    return _loaded(source, upright)


def _loaded(source: Any, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    image = open_image(source)
    try:
        return convert(image)
    except Exception as error:  # Pillow's decoders raise many types for damaged files, from struct.error to IndexError
        raise BrokenImage(f"the image is damaged ({_first_line(error)})") from error


def verify_image(source: Any) -> tuple[int, int]:
    """Check an image for damage as cheaply as possible, and return its upright (width, height).

    `Image.verify` does not notice a truncated JPEG; decoding at an eighth of the size still reads every byte.

    Raises:
        BrokenImage: the image cannot be decoded completely, or has pixels that are not finite.
    """
    image = open_image(source)
    full_size = image.size
    try:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        size = upright_size(image, full_size)
        require_finite(image)
    except Exception as error:  # as in load_rgb
        raise BrokenImage(f"the image is damaged ({_first_line(error)})") from error
    return size


def upright_size(image: Image.Image, full_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Decode an opened image, and return the (width, height) that it has after `upright`.

    Args:
        full_size: the size that it was opened with, if it is decoded at a smaller one (`Image.draft`).
    """
    image.load()  # only then is it known which decoders have turned the image themselves
    width, height = full_size or image.size
    return (height, width) if turned(image) > 4 else (width, height)


def decoded(row: Mapping[str, Any], column: str, read: Callable[[Any], Image.Image] = load_rgb) -> Image.Image:
    """Return the image in a column of a row, decoded completely.

    Args:
        read: opens the stored value: `load_rgb`, `open_image` or another function.

    Raises:
        BadSample: the image cannot be decoded.
    """
    try:
        image = read(row[column])
        image.load()
    except (BrokenImage, OSError, SyntaxError) as error:
        raise BadSample(column, str(error)) from error
    return image


def require_size(image: Image.Image, size: tuple[int, int], column: str) -> None:
    """Raise BadSample if the image of `column` is not of `size` (width, height), the size of the row's own image."""
    if image.size != size:
        raise BadSample(column, f"it is {image.width}×{image.height} pixels, but its image is {size[0]}×{size[1]}")


def byte_tensor(image: Image.Image) -> torch.Tensor:
    """Return the pixels of an 8-bit image as uint8: H W of a grey image, 3 H W of a colour image."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an image of H × W pixels to a float32 tensor C H W in [-1, 1]: C is 3 (RGB), 1 (grey), or 4.

    The colours of an RGBA image are blended with white; `pipelines.common.pixels` says why.
    """
    return from_bytes(byte_tensor(image) if image.mode == "RGB" else image_channels(image))


def from_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Convert the pixels of an 8-bit image, uint8 C H W, to float32 in [-1, 1]."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(2 / 255).sub_(1)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
