"""Read from a PNG file how it was generated, so that it can be generated again; see generated.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import UserError
from .files import read_image

if TYPE_CHECKING:
    from ..common.design_brief import DesignBrief

CONDITIONS = ("prompt", "class_label", "brief", "caption", "control_image", "image")
NOT_REPEATED = ("guide", "autoguidance_scale", "guidance_interval", "checkpoint", "jump_n_sample")
"""Settings of sample.py that the studio does not have."""


@dataclass
class Recipe:
    """How a PNG file was generated: with images of the seeds `seed`, `seed` + 1, … in one batch."""

    seed: int
    num_images: int = 1
    """Number of images in the batch, or in the first row of a grid"""
    texts: dict[str, str] = field(default_factory=dict)
    """Conditions and settings as they are written in the file"""
    size: tuple[int, int] | None = None
    """Height and width of the image; None for a grid"""
    place: int = 0
    """Position of the image in the batch, from 0; 0 for a grid"""

    def number(self, name: str) -> float | None:
        """Return a setting as a number; None if it is not there or is not one number."""
        try:
            return float(self.texts[name])
        except (KeyError, ValueError):
            return None

    def batch(self, most: int) -> tuple[int, int]:
        """Return the first seed and the number of images, at most `most`, with which the image is generated again.

        The whole batch is generated, because the image has the same bits only there. A batch that is too large for
        `most` begins with the image.
        """
        if self.num_images <= most:
            return self.seed, self.num_images
        return self.seed + self.place, min(self.num_images - self.place, most)


def read_recipe(path: str | Path) -> Recipe:
    """Return how a PNG file was generated, from its metadata. Of a grid, the first row is read.

    Raises:
        UserError: The file is not an image, or has no seed in its metadata.
    """
    image = read_image(Path(path).expanduser())
    texts = {name: value for name, value in getattr(image, "text", {}).items() if isinstance(value, str)}
    seeds = re.findall(r"\d+", texts.get("seed", "").split("\n")[0])
    if not seeds:
        raise UserError(
            f"{path} has no seed in its metadata; choose a PNG file that sample.py or the studio has written, and that "
            "no other program has saved again"
        )
    is_grid = "," in texts["seed"] or "\n" in texts["seed"]
    first = {name: value.split("\n")[0] if is_grid else value for name, value in texts.items()}
    height, width, together = first.pop("height", ""), first.pop("width", ""), first.pop("batch_seeds", "")
    size = (int(height), int(width)) if height.isdecimal() and width.isdecimal() else None
    if size is None and not is_grid:
        size = (image.height, image.width)
    if is_grid:
        return Recipe(int(seeds[0]), len(seeds), first, size)
    seed, count = _batch_of(int(seeds[0]), together)
    return Recipe(seed, count, first, size, int(seeds[0]) - seed)


def _batch_of(seed: int, text: str) -> tuple[int, int]:
    """Return the first seed and the size of the batch of an image. Earlier versions did not write it into the file."""
    seeds = [int(part) for part in re.findall(r"\d+", text)]
    if seed in seeds and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return seeds[0], len(seeds)
    return seed, 1


def sampler_of(recipe: Recipe, own_class: str) -> str | None:
    """Return the name of the sampler for `set_scheduler`; None for the model's own, of the class `own_class`.

    Files of earlier versions have only the class of the sampler, which several samplers can share. The first is taken.
    """
    from ..common.schedulers import SAMPLERS

    used = recipe.texts.get("scheduler")
    if "sampler" in recipe.texts or used in (None, own_class):
        return recipe.texts.get("sampler")
    return next((name for name, sampler in SAMPLERS.items() if used in (sampler.diffusion, sampler.flow)), None)


def brief_text(brief: DesignBrief) -> str:
    """Return the fields of a brief on one line, for metadata; an empty string for an empty brief."""
    fields = {
        name: " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        for name, value in brief.to_dict().items()
    }
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def brief_of(text: str) -> DesignBrief:
    """Return the brief that `brief_text` has written. Raises UserError."""
    from ..common.design_brief import COUNTS, DesignBrief

    fields: dict[str, Any] = {}
    for part in filter(None, text.split(", ")):
        name, _, value = part.partition(" ")
        fields[name] = value.split() if name == "palette" else value
    try:
        numbers: Mapping[str, Any] = {
            name: int(value) if name in COUNTS else float(value)
            for name, value in fields.items()
            if name not in ("palette", "style")
        }
        return DesignBrief.from_mapping({**fields, **numbers})
    except ValueError as error:
        raise UserError(f"the brief '{text}' in the metadata cannot be read: {error}") from error
