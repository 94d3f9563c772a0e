"""Read from a PNG file how it was generated, so that it can be generated again; see generated.py."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import UserError
from .files import read_image

if TYPE_CHECKING:
    from PIL import Image

    from ..common.design_brief import DesignBrief

CONDITIONS = ("prompt", "class_label", "brief")
"""What an image shows, as texts."""
FILES = ("image", "mask_image", "control_image")
"""Names of image files, which are not part of the generated file."""
STEERING = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
NOT_REPEATED = ("guide", "autoguidance_scale", "guidance_interval", "checkpoint", "lora", "lora_scale")
"""Settings of sample.py that the studio does not have."""
SETTINGS = (
    *CONDITIONS, "negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "sampler", "strength",
    "jump_n_sample", "paste_back", *STEERING, *NOT_REPEATED,
)  # fmt: skip
"""Everything in the metadata that the pixels depend on, except model, files, seeds and size."""

# What a model did to generate an image; `task_of` tells it from the metadata, and each tab of the studio does one.
GENERATION, CONTROL, IMAGE_TO_IMAGE, INPAINTING = "generation", "control", "image to image", "inpainting"
DRAWING, PAIRS = "drawing", "pairs"


@dataclass
class Recipe:
    """How a PNG file was generated: with images of the seeds `seed`, `seed` + 1, … in one batch."""

    seed: int
    num_images: int = 1
    """Number of images in the batch, or in the first row of a grid"""
    texts: dict[str, str] = field(default_factory=dict)
    """Conditions and settings as they are written in the file"""
    size: tuple[int, int] | None = None
    """Height and width in pixels, if they are written in the file; None is the size of the training"""
    place: int = 0
    """Position of the image in the batch, from 0; 0 for a grid"""

    def conditions(self) -> set[str]:
        """Return the names of the conditions of CONDITIONS that the image was generated from."""
        return {name for name in CONDITIONS if name in self.texts}

    def number(self, name: str) -> float | None:
        """Return a setting as a number; None if it is not there or is not one number."""
        try:
            return float(self.texts[name])
        except (KeyError, ValueError):
            return None

    def numbers(self, name: str) -> list[float]:
        """Return a setting that may have a value for each ControlNet; empty if it is missing or not a number."""
        try:
            return [float(part) for part in self.texts[name].split(",")]
        except (KeyError, ValueError):
            return []

    def differing(self, facts: Mapping[str, str]) -> list[str]:
        """Return the names of the settings in the file that images with the metadata `facts` would not have.

        A setting differs if it is missing in `facts` or has another value there. Height and width are compared as well.
        """
        names = [name for name in SETTINGS if name in self.texts and not _same(self.texts[name], facts.get(name))]
        if self.size is not None:
            sizes = zip(("height", "width"), self.size)
            names += [name for name, side in sizes if not _same(str(side), facts.get(name))]
        return names

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
    size = _size_of(height, width, None if is_grid else image)
    if is_grid:
        return Recipe(int(seeds[0]), len(seeds), first, size)
    seed, count = _batch_of(int(seeds[0]), together)
    return Recipe(seed, count, first, size, int(seeds[0]) - seed)


def task_of(recipe: Recipe) -> str:
    """Return what the model did: GENERATION, CONTROL, IMAGE_TO_IMAGE, INPAINTING, DRAWING or PAIRS."""
    names = recipe.texts.keys()
    if "caption" in names:
        return PAIRS
    if names & {"mask_image", "jump_n_sample", "paste_back"}:
        return INPAINTING
    if names & {"control_image", *STEERING}:
        return CONTROL
    if names & {"image", "strength"}:
        return IMAGE_TO_IMAGE
    # An image–caption model draws a prompt in one pass.
    return GENERATION if "num_inference_steps" in names or "prompt" not in names else DRAWING


def same_model(recipe: Recipe, name: str) -> int:
    """Return how well the model of a file has this name: 2 the same, 1 the same folder below another one, 0 not."""
    used = recipe.texts.get("model", "")
    if used == name:
        return 2
    return int(bool(used) and used.split("/")[-1] == name.split("/")[-1])


def _same(text: str, other: str | None) -> bool:
    """Whether two texts are equal, or equal as numbers or as lists of numbers, of which one stands for all."""
    if other is None or text.strip() == other.strip():
        return other is not None
    try:
        one, two = ([float(part) for part in whole.split(",")] for whole in (text, other))
    except ValueError:
        return False
    count = max(len(one), len(two))
    one, two = ([*part] * count if len(part) == 1 else part for part in (one, two))
    # The studio writes six digits, and sample.py all of them.
    return len(one) == len(two) and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(one, two))


def _size_of(height: str, width: str, image: Image.Image | None) -> tuple[int, int] | None:
    """Return height and width as they are written; a missing one follows from the shape of the image, if given.

    The image itself may be enlarged (`--scale` of sample.py).
    """
    sides = [int(side) if side.isdecimal() and int(side) else None for side in (height, width)]
    if image is not None and sides[0] is None and sides[1] is not None:
        sides[0] = round(sides[1] * image.height / image.width)
    if image is not None and sides[1] is None and sides[0] is not None:
        sides[1] = round(sides[0] * image.width / image.height)
    return None if sides[0] is None or sides[1] is None else (sides[0], sides[1])


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
