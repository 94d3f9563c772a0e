"""What a stage shows at a preview, and pictures written whole or not at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipelines.tools.grids import image_grid
from training.core.files import write_atomically


@dataclass
class Previews:
    """What a stage shows at a preview.

    Attributes:
        images: pictures from the public pipeline, RGB.
        captions: one line each: the prompt, the label, or what the picture is.
        references: training pictures to judge them by (collapse detection); None where nothing compares.
        columns: of the grid; None chooses.
    """

    images: list[Image.Image]
    captions: list[str]
    references: list[Image.Image] | None = None
    columns: int | None = None

    def grid(self) -> Image.Image:
        return image_grid(self.images, self.captions, columns=self.columns)


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write `image` as a PNG that is either whole or absent, making its folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: image.save(file, format="PNG"))
    return path
