"""Pictures for people to look at: grids, small pictures enlarged, controls in colour.

Shapes: C control channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

GAP = 4  # pixels between pictures
PAPER = (255, 255, 255)
COMFORTABLE = 128  # pixels of a side below which a picture is hard to see on a screen
CHANNEL_COLORS = ((1, 1, 1), (0.9, 0.3, 0.2), (0.2, 0.5, 0.9), (0.95, 0.8, 0.2), (0.3, 0.7, 0.4), (0.6, 0.4, 0.8))


def picture_grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures of one size on white, with a small gap."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP), PAPER)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (GAP + x * (width + GAP), GAP + y * (height + GAP)))
    return sheet


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture by the whole factor that makes its shorter side `COMFORTABLE` at least, its pixels as squares;
    others as they are."""
    factor = -(-COMFORTABLE // min(picture.size))
    width, height = picture.size
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST) if factor > 1 else picture


def control_picture(control: Tensor) -> Image.Image:
    """A control (C H W, in [0, 1]) to look at: three channels as colours, else a colour for each."""
    channels = control.detach().float().cpu().numpy()
    if len(channels) != 3:
        colors = np.resize(np.array(CHANNEL_COLORS), (len(channels), 3))
        channels = (channels[:, None] * colors[:, :, None, None]).max(0)
    pixels = (channels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
