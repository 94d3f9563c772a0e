"""New pictures with their captions printed below: what `sample.py --pairs` does with a model of both."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN, GAP, LINE = 12, 10, 16  # pixels
PAPER, INK = (255, 255, 255), (38, 38, 38)
CELL = 160  # smaller pictures are enlarged towards this width
FONT_SIZE, MOST_LINES = 13, 4


def sample_pairs(pipeline: Any, options: argparse.Namespace, output: Path) -> None:
    """Invent `options.pairs` pairs, write them as one picture, and print the captions. Pair k is drawn from seed + k.

    Raises:
        UserError: a model that invents no pairs, or options that cannot be.
    """
    if not hasattr(pipeline, "caption"):
        raise UserError(
            f"--pairs wants a model of pictures and captions (training/train_image_caption.py), and {options.model} "
            f"is a {type(pipeline).__name__}"
        )
    started = time.perf_counter()
    images, captions = invented(pipeline, options)
    pair_sheet(images, captions).save(output)
    for caption in captions:
        print(caption)
    print(f"{len(images)} pairs, {time.perf_counter() - started:.1f} s: {output}")


def invented(pipeline: Any, options: argparse.Namespace) -> tuple[list[Image], list[str]]:
    """Pictures and captions. Raises UserError."""
    import torch

    if options.pairs < 1:
        raise UserError(f"--pairs must be at least 1, but is {options.pairs}")
    images: list[Image] = []
    captions: list[str] = []
    for start in range(0, options.pairs, options.batch_size):
        numbers = range(start, min(start + options.batch_size, options.pairs))
        generators = [torch.Generator().manual_seed(options.seed + number) for number in numbers]
        try:
            found = pipeline.sample(len(numbers), generator=generators, num_inference_steps=options.num_inference_steps)
        except ValueError as error:
            raise UserError(str(error)) from error
        images += found.images
        captions += found.captions
    return images, captions


def pair_sheet(images: Sequence[Image], captions: Sequence[str]) -> Image:
    """Pictures of one size in rows, each with its caption under it."""
    from PIL import Image as PIL_Image
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    factor = max(1, round(CELL / images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    columns = next((c for c in (4, 3, 2) if len(images) >= c and width * c <= 1600), 1)
    texts = [_wrapped(caption, width, font) for caption in captions]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    text_heights = [LINE * max(len(texts[i]) for i in row) for row in rows]
    sheet_height = 2 * MARGIN + sum(height + GAP + text for text in text_heights) + GAP * (len(rows) - 1)
    sheet = PIL_Image.new("RGB", (2 * MARGIN + columns * width + (columns - 1) * GAP, sheet_height), PAPER)
    draw, y = ImageDraw.Draw(sheet), MARGIN
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, i in enumerate(row):
            x = MARGIN + column * (width + GAP)
            sheet.paste(images[i].resize((width, height), PIL_Image.Resampling.NEAREST), (x, y))
            for number, line in enumerate(texts[i]):
                draw.text((x, y + height + 4 + number * LINE), line, fill=INK, font=font)
        y += height + 2 * GAP + text_height
    return sheet


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """`text` in at most MOST_LINES lines of `width` pixels; what does not fit is cut short with dots."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"{lines[MOST_LINES - 1]} ..."]
    return lines or [""]
