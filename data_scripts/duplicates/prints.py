"""What is kept of an image to find its copies: four perceptual hashes of 64 bits, and a thumbnail.

N images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from training.data.transforms import BrokenImage, load_rgb, open_image, upright_size

THUMBNAIL = 32  # pixels of its sides
CUT = 0.04  # share of each side that is cut off for the hashes of the inner part
HASH_SIDE = 64  # pixels; hashes have 8 × 8 bits, and details of a larger image have no influence on them
# Columns of the hashes: of the whole image, of its mirror image, of its inner part, of the mirrored inner part.
WHOLE, MIRRORED, INNER, MIRRORED_INNER = range(4)


class Print(NamedTuple):
    """What is kept of one image."""

    hashes: np.ndarray
    """4 uint64"""
    thumbnail: np.ndarray
    """`THUMBNAIL` × `THUMBNAIL` × 3 uint8"""


class Place(NamedTuple):
    """Where an image is: its split, its row there, and the part of the data that is trained on or held out together."""

    split: str
    row: int
    part: str


@dataclass
class Prints:
    """Prints of the distinct images of a dataset, each with the places of all files with the same bytes."""

    places: list[list[Place]] = field(default_factory=list)
    hashes: list[np.ndarray] = field(default_factory=list)
    """of each image, 4 uint64"""
    thumbnails: list[np.ndarray] = field(default_factory=list)
    """of each image, `THUMBNAIL` × `THUMBNAIL` × 3 uint8"""
    _position: dict[bytes, int] = field(default_factory=dict)

    def add(self, place: Place, digest: bytes, one: Print) -> None:
        """Add an image, or only its place if an image with this digest of its file is known."""
        position = self._position.setdefault(digest, len(self.places))
        if position < len(self.places):
            self.places[position].append(place)
            return
        self.places.append([place])
        self.hashes.append(one.hashes)
        self.thumbnails.append(one.thumbnail)


def verified_print(source: Any) -> tuple[tuple[int, int], Print]:
    """Return the upright (width, height) and the print of an image, of which every byte is read.

    Raises:
        BrokenImage: the image cannot be decoded completely.
    """
    image = open_image(source)
    full_size = image.size
    try:
        image.draft(None, (2 * HASH_SIDE, 2 * HASH_SIDE))  # JPEG is decoded faster at a smaller size
        size = upright_size(image, full_size)
    except Exception as error:  # as in load_rgb
        raise BrokenImage(f"the image is damaged ({error})") from error
    rgb = load_rgb(image)
    del image
    return size, print_of(rgb)


def print_of(image: Image.Image) -> Print:
    """Return the print of an RGB image.

    The hash is the difference hash of ImageHash (dHash): one bit for each of 8 × 8 places, which says whether the image
    becomes brighter to the right there. pHash was worse: bits of its symmetric and flat images are noise.
    """
    thumbnail = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    grey = image.convert("L")
    width, height = grey.size
    inside = (CUT * width, CUT * height, (1 - CUT) * width, (1 - CUT) * height)
    whole, inner = (grey.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX, box=box) for box in (None, inside))
    hashes = [_hash(one) for image in (whole, inner) for one in (image, ImageOps.mirror(image))]
    return Print(np.array(hashes, dtype=np.uint64), np.asarray(thumbnail))


def _hash(grey: Image.Image) -> np.uint64:
    from imagehash import dhash

    return np.packbits(dhash(grey).hash.ravel()).view(np.uint64)[0]
