"""Preview images of a stage, and atomic writing of PNG files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pipelines.tools.grids import image_grid
from training.core.files import write_atomically


@dataclass
class Previews:
    """Preview images of a stage.

    Attributes:
        images: RGB images from the public pipeline.
        captions: one line per image: the prompt, the label, or a description.
        prompts: the prompts among the captions, as examples for users; None if all captions are prompts.
        references: training images to compare with, for collapse detection; None if none are comparable.
        columns: number of columns of the grid; None chooses it automatically.
    """

    images: list[Image.Image]
    captions: list[str]
    prompts: list[str] | None = field(default=None, kw_only=True)
    references: list[Image.Image] | None = None
    columns: int | None = None

    def grid(self) -> Image.Image:
        return image_grid(self.images, self.captions, columns=self.columns)


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write `image` as a PNG file atomically, create its folder if needed, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: image.save(file, format="PNG"))
    return path
