"""Any picture file to a square RGB tensor: decoding, crop geometry and flips (Pillow and NumPy).

H W source pixels, R the training resolution. Whatever is random here (crop, flip, which caption) is a pure function of
the sample's key, so the order of calls, the number of workers and a resume change nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from pipelines.common.pixels import to_rgb
from training.core.draws import mix

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Raised whenever the pixels that come out of this file change: latent caches made before are then refused.
TRANSFORM_VERSION = 1


class BrokenImage(Exception):
    """A picture that cannot be decoded; the message says why."""


class BadSample(Exception):
    """A row that cannot be trained on: which column, and why."""

    def __init__(self, column: str, reason: str):
        super().__init__(reason)
        self.column = column


class CropGeometry(NamedTuple):
    """Where a training picture is cut from its source; masks and control images of the same sample share it."""

    left: int
    top: int
    side: int
    flip: bool


def uniform(key: int, purpose: str) -> float:
    """A number in [0, 1) that is a function of the sample's `key` and of what it is drawn for."""
    return (mix(key, purpose) >> 10) / (1 << 53)


def flips(key: int) -> bool:
    """Whether the sample of this key is mirrored (probability 1/2): one answer for pixels and for cached latents."""
    return uniform(key, "flip") < 0.5


def pick_caption(captions: str | list[str], key: int) -> str:
    """The caption of this draw: of several captions of a picture, one by `key`."""
    if isinstance(captions, str):
        return captions
    return captions[int(uniform(key, "caption") * len(captions))]


def crop_geometry(size: tuple[int, int], *, center_crop: bool, random_flip: bool, key: int) -> CropGeometry:
    """The largest square of a picture of `size` (width, height): its middle, or a place drawn from `key`."""
    width, height = size
    side = min(width, height)
    # Whole pixels: half a pixel of offset would blur pictures that need no resizing.
    across = 0.5 if center_crop else uniform(key, "crop_x")
    down = 0.5 if center_crop else uniform(key, "crop_y")
    left = min(int(across * (width - side + 1)), width - side)
    top = min(int(down * (height - side + 1)), height - side)
    return CropGeometry(left, top, side, random_flip and flips(key))


def apply_geometry(image: Image.Image, geometry: CropGeometry, resolution: int, resampling: str) -> Image.Image:
    """Cut, scale to `resolution` × `resolution` and mirror. Masks take `resampling="nearest"`."""
    left, top, side, flip = geometry
    box = (left, top, left + side, top + side)
    if side == resolution:
        image = image.crop(box) if image.size != (side, side) else image
    else:
        # One call resamples from the box: no intermediate picture of the uncropped size.
        image = image.resize((resolution, resolution), RESAMPLING[resampling], box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def open_image(source: Any) -> Image.Image:
    """Open, but do not yet decode.

    Args:
        source: what `datasets.Image(decode=False)` gives ({"bytes", "path"}), a path, or a picture.

    Raises:
        BrokenImage: nothing there, or no picture format that Pillow knows.
    """
    if isinstance(source, Image.Image):
        return source
    if source is None:
        raise BrokenImage("there is no image in this row")
    data, path = (source.get("bytes"), source.get("path")) if isinstance(source, dict) else (None, source)
    try:
        if data is not None:
            return Image.open(io.BytesIO(data))
        if not path or not Path(path).is_file():
            raise BrokenImage(f"file {path!r} does not exist")
        return Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"not a readable picture ({_first_line(error)})") from error


def load_rgb(source: Any) -> Image.Image:
    """Decode `source` (see `open_image`) into an upright 8-bit RGB picture.

    EXIF orientation is applied, transparency is laid on white, 16-bit and float pictures are scaled to 8 bits, palette
    and CMYK converted, and of an animation the first frame is taken.

    Raises:
        BrokenImage: it cannot be decoded completely.
    """
    image = open_image(source)
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except (
        Exception
    ) as error:  # Pillow's decoders raise whatever a damaged file leads them to, struct.error to IndexError
        raise BrokenImage(f"the picture is damaged ({_first_line(error)})") from error


def verify_image(source: Any) -> tuple[int, int]:
    """Decode `source` as cheaply as finds damage, and return its upright (width, height).

    `Image.verify` alone passes a truncated JPEG; decoding at an eighth of the size reads every byte of it.

    Raises:
        BrokenImage: it cannot be decoded completely.
    """
    image = open_image(source)
    try:
        size = upright_size(image)
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    except Exception as error:  # as in load_rgb
        raise BrokenImage(f"the picture is damaged ({_first_line(error)})") from error
    return size


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image once its EXIF orientation is applied."""
    width, height = image.size
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def decoded(row: Mapping[str, Any], column: str, read: Callable[[Any], Image.Image] = load_rgb) -> Image.Image:
    """The image in a row's column, decoded completely.

    Args:
        read: `load_rgb`, `open_image`, or another function that opens what the column holds.

    Raises:
        BadSample: it cannot be decoded.
    """
    try:
        image = read(row[column])
        image.load()
    except (BrokenImage, OSError, SyntaxError) as error:
        raise BadSample(column, str(error)) from error
    return image


def require_size(image: Image.Image, size: tuple[int, int], column: str) -> None:
    """Raises BadSample when the image of `column` has not the `size` (width, height) of its row's image."""
    if image.size != size:
        raise BadSample(column, f"it is {image.width}×{image.height} pixels and its image {size[0]}×{size[1]}")


def byte_tensor(image: Image.Image) -> torch.Tensor:
    """The pixels of an 8-bit image as they are: uint8, H W of a grey one and 3 H W of one in colour."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image of H × W pixels to a float32 tensor 3 H W in [-1, 1]."""
    pixels = byte_tensor(image)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(2 / 255).sub_(1)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
