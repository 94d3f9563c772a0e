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
    """How a PNG file was generated."""

    seed: int
    num_images: int = 1
    texts: dict[str, str] = field(default_factory=dict)
    """Conditions and settings as they are written in the file"""
    size: tuple[int, int] | None = None
    """Height and width of the image; None for a grid"""

    def number(self, name: str) -> float | None:
        """Return a setting as a number; None if it is not there or is not one number."""
        try:
            return float(self.texts[name])
        except (KeyError, ValueError):
            return None


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
    height, width = first.pop("height", ""), first.pop("width", "")
    size = (int(height), int(width)) if height.isdecimal() and width.isdecimal() else None
    if size is None and not is_grid:
        size = (image.height, image.width)
    return Recipe(int(seeds[0]), len(seeds), first, size)


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
