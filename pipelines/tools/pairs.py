"""Sample from image–caption models for `sample.py`: generate new pairs, or draw prompts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .cli import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def makes_pairs(pipeline: Any) -> bool:
    """Whether the pipeline is an image–caption model."""
    return hasattr(pipeline, "caption")


def generate_pairs(pipeline: Any, options: argparse.Namespace) -> tuple[list[Image], list[str]]:
    """Generate `options.pairs` images and their captions in batches; pair k uses seed + k. Raises UserError."""
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
