"""Sample from image–caption models for `sample.py`: generate new pairs, or draw prompts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import UserError
from .grids import image_grid

if TYPE_CHECKING:
    from PIL.Image import Image


def makes_pairs(pipeline: Any) -> bool:
    """Whether the pipeline is an image–caption model."""
    return hasattr(pipeline, "caption")


def sample_pairs(pipeline: Any, options: argparse.Namespace, output: Path) -> None:
    """Generate `options.pairs` pairs, save them as one image, and print the captions. Pair k uses seed + k.

    Raises:
        UserError: If the model has no prior, or an option is invalid.
    """
    started = time.perf_counter()
    images, captions = generate_pairs(pipeline, options)
    image_grid(images, captions).save(output)
    for caption in captions:
        print(caption)
    print(f"{len(images)} pairs, {time.perf_counter() - started:.1f} s: {output}")


def generate_pairs(pipeline: Any, options: argparse.Namespace) -> tuple[list[Image], list[str]]:
    """Generate images and their captions in batches. Raises UserError."""
    import torch

    images: list[Image] = []
    captions: list[str] = []
    for start in range(0, options.pairs, options.batch_size):
        numbers = range(start, min(start + options.batch_size, options.pairs))
        generators = [torch.Generator().manual_seed(options.seed + number) for number in numbers]
        try:
            pairs = pipeline.sample(len(numbers), generator=generators, num_inference_steps=options.num_inference_steps)
        except ValueError as error:
            raise UserError(str(error)) from error
        images += pairs.images
        captions += pairs.captions
    return images, captions


def draw_prompts(pipeline: Any, prompts: Sequence[str], options: argparse.Namespace) -> list[list[Image]]:
    """Generate a row of `num_images` images for each prompt; column k uses seed + k. Raises UserError."""
    import torch

    cells = [(prompt, column) for prompt in prompts for column in range(options.num_images)]
    images: list[Image] = []
    for start in range(0, len(cells), options.batch_size):
        batch = cells[start : start + options.batch_size]
        generators = [torch.Generator().manual_seed(options.seed + column) for _, column in batch]
        try:
            images += pipeline.draw([prompt for prompt, _ in batch], generator=generators).images
        except ValueError as error:
            raise UserError(str(error)) from error
    return [images[start : start + options.num_images] for start in range(0, len(images), options.num_images)]
