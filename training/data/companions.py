"""Pictures that go with a picture: segmentation masks and control images, of its size and cut as it is.

R training resolution, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from training.data.transforms import BadSample, BrokenImage, load_rgb, open_image
from training.objectives.segmentation import IGNORE_INDEX


class SegmentationMask:
    """A column of masks: one class id per pixel.

    Args:
        num_classes: K; ids are 0 to K - 1, or `IGNORE_INDEX`. At most 255.
    """

    resampling: str | None = "nearest"

    def __init__(self, column: str, num_classes: int, flag: str = "mask_column"):
        self.columns, self.flags, self.num_classes = [column], [flag], num_classes

    def load(self, row: Mapping[str, Any], size: tuple[int, int]) -> list[Image.Image]:
        """The stored mask, its ids as grey values.

        Raises:
            BadSample: it cannot be decoded, is not of `size` (width, height), holds colours, or ids beyond the classes.
        """
        column = self.columns[0]
        mask = _decoded(row, column, _class_ids)
        _require_size(mask, size, column)
        ids = np.unique(np.asarray(mask))
        beyond = ids[(ids >= self.num_classes) & (ids != IGNORE_INDEX)]
        if beyond.size:
            raise BadSample(
                column,
                f"class id {beyond[0]} is beyond the {self.num_classes} classes (0 to {self.num_classes - 1}, "
                f"and {IGNORE_INDEX} for unlabelled pixels)",
            )
        return [mask]

    def tensor(self, masks: Sequence[Image.Image]) -> torch.Tensor:
        """int64 R R."""
        return torch.from_numpy(np.array(masks[0], dtype=np.int64))


class ControlImage:
    """Control images: one column in colour (3 R R), or several in grey, a channel each (C R R); in [0, 1].

    Args:
        columns: one name for a picture in colour; a list of names for grey channels.
    """

    resampling: str | None = None  # that of the pictures

    def __init__(self, columns: str | Sequence[str]):
        self.in_color = isinstance(columns, str)
        self.columns = [columns] if isinstance(columns, str) else list(columns)
        self.flags = ["conditioning_image_column"] * len(self.columns)

    @property
    def channels(self) -> int:
        return 3 if self.in_color else len(self.columns)

    def load(self, row: Mapping[str, Any], size: tuple[int, int]) -> list[Image.Image]:
        """The stored pictures, RGB or grey.

        Raises:
            BadSample: one cannot be decoded, or is not of `size` (width, height).
        """
        images = []
        for column in self.columns:
            image = _decoded(row, column, load_rgb)
            _require_size(image, size, column)
            images.append(image if self.in_color else image.convert("L"))
        return images

    def tensor(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """float32 C R R in [0, 1]."""
        arrays = [np.atleast_3d(np.array(image, dtype=np.uint8)) for image in images]
        return torch.from_numpy(np.concatenate(arrays, axis=2)).movedim(2, 0).float().div_(255).contiguous()


class ClassControl(SegmentationMask):
    """Control by class: a column of class ids as K R R, one-hot in {0, 1}; unlabelled pixels are 0 in all channels."""

    def __init__(self, column: str, num_classes: int):
        super().__init__(column, num_classes, "conditioning_image_column")

    @property
    def channels(self) -> int:
        return self.num_classes

    def tensor(self, masks: Sequence[Image.Image]) -> torch.Tensor:
        ids = super().tensor(masks)
        return torch.stack([ids == c for c in range(self.num_classes)]).float()


Companion = SegmentationMask | ControlImage


def control_of(columns: str | Sequence[str], num_classes: int) -> ControlImage | ClassControl:
    """What `--conditioning_image_column` and `--conditioning_classes` name."""
    if not num_classes:
        return ControlImage(columns)
    return ClassControl(columns if isinstance(columns, str) else columns[0], num_classes)


def _class_ids(source: Any) -> Image.Image:
    """A stored mask as grey values that are its ids: palettes are not applied, black and white are 0 and 1."""
    image = open_image(source)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "P"):
        return Image.fromarray(np.array(image, dtype=np.uint8))
    if image.mode == "1" or image.mode.startswith("I"):
        ids = np.asarray(image).astype(np.int64)
        if ids.max(initial=0) <= IGNORE_INDEX:
            return Image.fromarray(ids.astype(np.uint8))
        raise BrokenImage(f"it has ids up to {ids.max()}; masks hold at most {IGNORE_INDEX} classes")
    raise BrokenImage(f"it has colours (mode {image.mode}), not one class id per pixel; save it as 8-bit grey")


def _require_size(image: Image.Image, size: tuple[int, int], column: str) -> None:
    if image.size != size:
        raise BadSample(column, f"it is {image.width}×{image.height} pixels and its picture {size[0]}×{size[1]}")


def _decoded(row: Mapping[str, Any], column: str, read: Any) -> Image.Image:
    try:
        return read(row[column])
    except (BrokenImage, OSError, SyntaxError) as error:
        raise BadSample(column, str(error)) from error
