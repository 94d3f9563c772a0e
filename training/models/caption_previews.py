"""Previews of the joint model of images and captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image

from training.core.batches import fetch
from training.core.draws import SampleKey
from training.core.previews import Previews
from training.data.images import ImageDataset
from training.metrics.images import to_pil

Divide = Callable[[Callable[[Sequence[int]], Iterable[Any]], int], list[Any]]


def caption_previews(pipeline: Any, data: ImageDataset, config: Any, divide: Divide) -> Previews:
    """Draw the previews in four rows: images generated from captions, generated pairs (if there is a prior), original
    images with their captions, and reconstructed images with predicted captions.

    Args:
        config: the config of train_image_caption.py.
        divide: see `ImageStage.divide`.
    """
    pipeline.set_progress_bar_config(disable=True)
    columns = max(config.num_previews, len(config.preview_prompts or []))

    def repeat(numbers: Sequence[int]) -> list[tuple[Image.Image, str, Image.Image, str]]:
        """Return images and captions of the data, each with its reconstruction and the caption predicted of it."""
        batch = fetch(data, [SampleKey(row, 0) for row in numbers])
        pixels = (batch["pixel_values"] + 1) / 2
        originals = pipeline.in_proportion([to_pil(image) for image in batch["pixel_values"]])
        repeated = pipeline.decode_latents(pipeline.encode_images(pixels))
        return list(zip(originals, batch["caption"], repeated, pipeline.caption(pixels), strict=True))

    def sample(numbers: Sequence[int]) -> list[tuple[Image.Image, str]]:
        generators = [torch.Generator().manual_seed(config.seed + number) for number in numbers]
        steps = config.preview_inference_steps
        pairs = pipeline.sample(len(numbers), generator=generators, num_inference_steps=steps)
        return list(zip(pairs.images, pairs.captions, strict=True))

    pairs = divide(repeat, min(columns, len(data)))
    prompts = config.preview_prompts or [caption for _, caption, _, _ in pairs]
    drawn = divide(lambda numbers: pipeline.draw([prompts[number] for number in numbers]).images, len(prompts))
    cells = _row(columns, zip(drawn, prompts, strict=True))
    if pipeline.prior is not None:
        cells += _row(columns, divide(sample, columns), "generated: ")
    cells += _row(columns, [(original, caption) for original, caption, _, _ in pairs], "original: ")
    cells += _row(columns, [(repeated, caption) for _, _, repeated, caption in pairs], "predicted: ")
    images, captions = ([*own] for own in zip(*cells, strict=True))
    return Previews(images, captions, prompts=list(prompts), columns=columns)


def _row(columns: int, cells: Iterable[tuple[Image.Image, str]], prefix: str = "") -> list[tuple[Image.Image, str]]:
    """Return a row with a prefix before its captions, filled with blank images."""
    row = [(image, prefix + caption) for image, caption in cells]
    blank = Image.new("RGB", row[0][0].size, "white")
    return row + [(blank, "")] * (columns - len(row))
