"""A folder of images that are not square, and training on it in float64.

It is also a script, for several processes: torchrun … tests/support/rectangles.py --train_data_dir …
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.tools.cli import entry_point


def draw_rectangles(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Draw an image of each (width, height): a disc in the colour of its caption on a dark gradient.

    The control image is the disc in white on black.
    """
    folder.mkdir(parents=True)
    lines = []
    for row, (width, height) in enumerate(sizes):
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x * 60 // width, y * 60 // height, np.full_like(x, 30)], -1)
        radius = min(width, height) * (3 + row % 3) / 15
        disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < radius**2
        pixels[disc, row % 3] = 230
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{row:03}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(folder / f"{row:03}_control.png")
        caption = f"a {('red', 'green', 'blue')[row % 3]} disc"
        names = {"file_name": f"{row:03}.png", "conditioning_image_file_name": f"{row:03}_control.png"}
        lines.append(json.dumps({**names, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def main(argv: list[str] | None = None) -> int:
    from training import train_latent_diffusion

    torch.set_default_dtype(torch.float64)
    try:
        return train_latent_diffusion.main(argv)
    finally:
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    entry_point(main)
