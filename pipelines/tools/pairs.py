"""What `sample.py` does with a model of pictures and captions: new pairs of both, and drawings of prompts."""

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
    """Whether it is a model of pictures and captions."""
    return hasattr(pipeline, "caption")


def sample_pairs(pipeline: Any, options: argparse.Namespace, output: Path) -> None:
    """Invent `options.pairs` pairs, write them as one picture, and print the captions. Pair k is drawn from seed + k.

    Raises:
        UserError: a model that invents no pairs, or options that cannot be.
    """
    started = time.perf_counter()
    images, captions = invented(pipeline, options)
    image_grid(images, captions).save(output)
    for caption in captions:
        print(caption)
    print(f"{len(images)} pairs, {time.perf_counter() - started:.1f} s: {output}")


def invented(pipeline: Any, options: argparse.Namespace) -> tuple[list[Image], list[str]]:
    """Pictures and captions. Raises UserError."""
    import torch

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


def drawings(pipeline: Any, prompts: Sequence[str], options: argparse.Namespace) -> list[list[Image]]:
    """A row of `num_images` pictures for each prompt; column k is drawn from seed + k. Raises UserError."""
    import torch

    wanted = [(prompt, column) for prompt in prompts for column in range(options.num_images)]
    pictures: list[Image] = []
    for start in range(0, len(wanted), options.batch_size):
        batch = wanted[start : start + options.batch_size]
        generators = [torch.Generator().manual_seed(options.seed + column) for _, column in batch]
        try:
            pictures += pipeline.draw([prompt for prompt, _ in batch], generator=generators).images
        except ValueError as error:
            raise UserError(str(error)) from error
    return [pictures[start : start + options.num_images] for start in range(0, len(pictures), options.num_images)]
