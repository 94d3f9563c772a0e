"""Dataset of posters with their feature maps, for the stages that learn to read posters.

B batch, R resolution. The columns are those that data_scripts/make_posters.py writes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image

from pipelines.common.poster_domain import COLOR_ROLES, COUNTS, F_TENSOR_CHANNELS, GRAMMAR
from pipelines.tools.cli import UserError
from pipelines.tools.commands import command
from pipelines.tools.files import open_image_file
from training.core.draws import SampleKey
from training.core.options import option
from training.data.images import BadSample, ImageDataset
from training.data.source import DataConfig, undecoded_images
from training.data.transforms import (
    BrokenImage,
    apply_geometry,
    byte_tensor,
    decoded,
    load_upright,
    open_image,
    require_size,
    to_tensor,
)

if TYPE_CHECKING:
    from datasets import Dataset

MAP_COLUMNS = F_TENSOR_CHANNELS
NUMBER_COLUMNS = (*GRAMMAR, *COUNTS)


@dataclass
class PosterDataConfig(DataConfig):
    """Source of the posters, and how they are augmented in training."""

    help_group = "Data"
    image_modes: ClassVar[tuple[str, ...]] = ("rgb",)

    photometric_augmentation: float = option(0.0, on_resume="warn", at_least=0)
    """Strength of random brightness, contrast, tint, blur, noise and JPEG artefacts on training posters; 0 disables
    them, 1 resembles a bad photograph of a poster"""


def require_poster_columns(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """Raise UserError if `dataset` lacks one of the `columns` of a poster dataset; `name` is for the message."""
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise UserError(
            f"{name} is not a poster dataset: it has no column {', '.join(missing)} (it has "
            f"{', '.join(dataset.column_names)}); "
            f"make one with {command('data_scripts/make_posters.py --output_dir FOLDER')}"
        )


class PosterDataset(ImageDataset):
    """Rows of a split as `{"pixel_values", "text_mask", "image_mask", "color_role", "hierarchy", "index"}`.

    `pixel_values` is float32 3 R R in [-1, 1]; masks are float32 1 R R in {0, 1}; `color_role` int64 R R of class ids;
    `hierarchy` float32 1 R R in [0, 1]. With `numbers`, also `grammar` (float32 8, in [0, 1]) and `counts` (float32 2).
    Maps are cropped and flipped with their poster. Everything random is a function of `SampleKey.key` alone.

    Raises:
        UserError: at construction, if the dataset is not a poster dataset; `BadRow` when an unusable row is read.
    """

    def __init__(
        self, dataset: Dataset, config: PosterDataConfig, *, numbers: bool = False, augment: bool = True, name: str = ""
    ):
        columns = [*MAP_COLUMNS, *(NUMBER_COLUMNS if numbers else ())]
        require_poster_columns(dataset, [config.image_column, *columns], name or str(config.dataset_name))
        super().__init__(dataset, config, captions=False, augment=augment)
        self.numbers = numbers
        self.strength = config.photometric_augmentation if augment else 0.0
        dataset = dataset.select_columns([config.image_column, *columns])
        for column in (config.image_column, *MAP_COLUMNS):
            dataset = undecoded_images(dataset, column, "image_column", config)
        self.dataset = dataset
        self.quick_columns = [config.image_column, *MAP_COLUMNS]
        self.map_columns, self.number_columns = MAP_COLUMNS, NUMBER_COLUMNS if numbers else ()

    def quick_problems(self, row: dict[str, Any]) -> list[BadSample]:
        """Return which maps are missing, broken or of another size than their poster."""
        problems = []
        try:
            poster = open_image(row[self.config.image_column])
        except BrokenImage:
            return []  # `image_problems` reports the poster itself
        for name in MAP_COLUMNS:
            try:
                require_size(open_image(row[name]), poster.size, name)
            except BadSample as problem:
                problems.append(problem)
            except BrokenImage as error:
                problems.append(BadSample(name, str(error)))
        return problems

    def item(self, row: dict[str, Any], key: SampleKey) -> dict[str, Any]:
        """Return the training sample of a stored row.

        Raises:
            BadSample: the row cannot be used.
        """
        image_column, resolution = self.config.image_column, self.config.resolution
        poster = decoded(row, image_column)
        geometry = self._crop(poster, key)
        maps = {}
        for name in MAP_COLUMNS:
            stored = decoded(row, name, load_upright)
            require_size(stored, poster.size, name)
            cut = apply_geometry(stored.convert("L"), geometry, resolution, "nearest")
            maps[name] = byte_tensor(cut)
        roles = int(maps["color_role"].max())
        if roles >= len(COLOR_ROLES):
            raise BadSample("color_role", f"it has class id {roles}; valid ids are 0 to {len(COLOR_ROLES) - 1}")
        poster = apply_geometry(poster, geometry, resolution, self.config.image_interpolation_mode)
        if self.strength:
            poster = photographed(poster, self.strength, np.random.default_rng(key.key))
        item: dict[str, Any] = {
            "pixel_values": to_tensor(poster),
            "text_mask": (maps["text_mask"] > 127).float()[None],
            "image_mask": (maps["image_mask"] > 127).float()[None],
            "color_role": maps["color_role"].long(),
            "hierarchy": (maps["hierarchy"].float() / 255)[None],
            "index": key.index,
        }
        if self.numbers:
            item["grammar"] = torch.tensor([float(row[name]) for name in GRAMMAR])
            item["counts"] = torch.tensor([float(row[name]) for name in COUNTS])
        return item


def photographed(poster: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Return the poster as a photograph might show it: with another brightness, contrast and tint, and sometimes with
    blur, noise or JPEG artefacts.

    Args:
        strength: 1 changes brightness and contrast by up to 25 % and each colour channel by up to 8 %.
    """
    pixels = np.asarray(poster, dtype=np.float32) / 255
    light, contrast = 1 + strength * rng.uniform(-0.25, 0.25, 2)
    tint = 1 + strength * rng.uniform(-0.08, 0.08, 3).astype(np.float32)
    pixels = ((pixels - 0.5) * np.float32(contrast) + 0.5) * np.float32(light) * tint
    if rng.random() < 0.3 * strength:
        pixels = _blurred(pixels, rng.uniform(0.1, 0.5) * strength)
    if rng.random() < 0.5 * strength:
        pixels = pixels + rng.uniform(0, 0.04) * strength * rng.standard_normal(pixels.shape, dtype=np.float32)
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
    if rng.random() < 0.3 * strength:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=int(rng.integers(40, 95)))
        image = open_image_file(buffer).convert("RGB")
    return image


def _blurred(pixels: np.ndarray, weight: float) -> np.ndarray:
    """Mix the pixels (H W 3) with the mean of their four neighbours."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    around = (padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]) / 4
    return (1 - weight) * pixels + np.float32(weight) * around
