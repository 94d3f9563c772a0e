"""Masks and control images that belong to an image and are cropped and flipped with it.

R training resolution, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from pipelines.tools.cli import UserError
from training.data.transforms import BadSample, BrokenImage, byte_tensor, decoded, load_upright, require_size
from training.objectives.segmentation import IGNORE_INDEX

logger = logging.getLogger("halftone")


class SegmentationMask:
    """A column of segmentation masks with one class id per pixel.

    Args:
        num_classes: number of classes K, at most 255; ids are 0 to K - 1, or `IGNORE_INDEX` for unlabelled pixels.
    """

    resampling: str | None = "nearest"

    def __init__(self, column: str, num_classes: int, flag: str = "mask_column"):
        self.columns, self.flags, self.num_classes = [column], [flag], num_classes

    def load(self, row: Mapping[str, Any], size: tuple[int, int]) -> list[Image.Image]:
        """Return the stored mask, with its ids as grey values.

        Raises:
            BadSample: the mask cannot be decoded, is not of `size` (width, height), has colours, or has ids beyond the
                classes.
        """
        column = self.columns[0]
        mask = decoded(row, column, _class_ids)
        require_size(mask, size, column)
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
        """Convert the cropped mask to a tensor of class ids, int64 R R."""
        return byte_tensor(masks[0]).long()


class ControlImage:
    """Control images from one or several columns: C R R in [0, 1].

    Args:
        mode: "rgb" reads each column in colour (three channels), "l" in grey (one channel).
    """

    resampling: str | None = None  # the same as for the image

    def __init__(self, columns: Sequence[str], mode: Literal["rgb", "l"]):
        self.columns, self.in_color = list(columns), mode == "rgb"
        self.flags = ["conditioning_image_column"] * len(self.columns)

    @property
    def kind(self) -> str:
        """The value of `control_kind` in FusionControlNetModel's config."""
        return "image" if self.in_color else "masks"

    @property
    def names(self) -> list[str]:
        """Names of the channels; empty for colour images, whose channels have no names."""
        return [] if self.in_color else self.columns

    @property
    def channels(self) -> int:
        return (3 if self.in_color else 1) * len(self.columns)

    def load(self, row: Mapping[str, Any], size: tuple[int, int]) -> list[Image.Image]:
        """Return the stored control images, RGB or grey.

        Raises:
            BadSample: an image cannot be decoded or is not of `size` (width, height).
        """
        images = []
        for column in self.columns:
            image = decoded(row, column)
            require_size(image, size, column)
            images.append(image if self.in_color else image.convert("L"))
        return images

    def tensor(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Convert the cropped control images to a tensor, float32 C R R in [0, 1]."""
        width, height = images[0].size
        channels = [byte_tensor(image).reshape(-1, height, width) for image in images]
        return torch.cat(channels).float().div_(255)


class ClassControl(SegmentationMask):
    """Control by a column of class ids: K R R, one-hot in {0, 1}; unlabelled pixels are 0 in all channels."""

    kind = "classes"

    def __init__(self, column: str, num_classes: int):
        super().__init__(column, num_classes, "conditioning_image_column")

    @property
    def names(self) -> list[str]:
        """The column of class ids."""
        return self.columns

    @property
    def channels(self) -> int:
        return self.num_classes

    def tensor(self, masks: Sequence[Image.Image]) -> torch.Tensor:
        ids = super().tensor(masks)
        return torch.stack([ids == c for c in range(self.num_classes)]).float()


Companion = SegmentationMask | ControlImage


def control_of(
    columns: str | Sequence[str], num_classes: int = 0, mode: Literal["rgb", "l"] | None = None
) -> ControlImage | ClassControl:
    """Return the control that is described by `--conditioning_image_column`, `--conditioning_classes` and
    `--conditioning_image_mode`.

    Args:
        mode: None reads a single column given as a string in colour and a list of columns in grey.

    Raises:
        UserError: a mode is given for class ids.
    """
    names = [columns] if isinstance(columns, str) else list(columns)
    if num_classes and mode is not None:
        raise UserError(
            f"--conditioning_image_mode {mode} and --conditioning_classes {num_classes} exclude each other: class ids "
            "are neither colours nor grey values; leave one of them out"
        )
    if num_classes:
        return ClassControl(names[0], num_classes)
    if mode is None and not isinstance(columns, str) and len(names) == 1:
        logger.warning(
            "--conditioning_image_column [%s] is a list, so the control images are read in grey (one channel); set "
            "--conditioning_image_mode l to hide this warning, or rgb to read them in colour",
            names[0],
        )
    return ControlImage(names, mode or ("rgb" if isinstance(columns, str) else "l"))


def _class_ids(source: Any) -> Image.Image:
    """Return a mask with its ids as grey values: palettes are not applied, and black and white become 0 and 1."""
    image = load_upright(source)
    if image.mode in ("L", "P"):
        return Image.fromarray(np.array(image, dtype=np.uint8))
    if image.mode == "1" or image.mode.startswith("I"):
        ids = np.asarray(image).astype(np.int64)
        if ids.max(initial=0) <= IGNORE_INDEX:
            return Image.fromarray(ids.astype(np.uint8))
        raise BrokenImage(f"it has ids up to {ids.max()}; masks can have at most {IGNORE_INDEX} classes")
    raise BrokenImage(f"it has colours (mode {image.mode}), not one class id per pixel; save it as 8-bit grey")
