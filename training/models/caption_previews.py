"""Previews of the joint model of images and captions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from training.core.batches import fetch
from training.core.draws import SampleKey
from training.core.previews import Previews
from training.data.images import ImageDataset
from training.metrics.images import to_pil


def caption_previews(pipeline: Any, data: ImageDataset, config: Any, poll: Callable[[], None]) -> Previews:
    """Draw the previews in four rows: images generated from captions, generated pairs (if there is a prior), original
    images with their captions, and reconstructed images with predicted captions.

    Args:
        config: the config of train_image_caption.py.
        poll: called between the rows; it raises an exception when the run is asked to stop.
    """
    pipeline.set_progress_bar_config(disable=True)
    columns = max(config.num_previews, len(config.preview_prompts or []))
    count = min(columns, len(data))
    batch = fetch(data, [SampleKey(row, 0) for row in range(count)])
    prompts = config.preview_prompts or batch["caption"]
    images, captions = list(pipeline.draw(prompts).images), list(prompts)
    _fill_row(images, captions, columns)
    poll()
    if pipeline.prior is not None:
        generators = [torch.Generator().manual_seed(config.seed + i) for i in range(columns)]
        pairs = pipeline.sample(columns, generator=generators, num_inference_steps=config.preview_inference_steps)
        images += pairs.images
        captions += [f"generated: {caption}" for caption in pairs.captions]
        poll()
    latents = pipeline.encode_images((batch["pixel_values"] + 1) / 2)
    predicted = pipeline.caption((batch["pixel_values"] + 1) / 2)
    originals = pipeline.in_proportion([to_pil(image) for image in batch["pixel_values"]])
    for row, words in ((originals, batch["caption"]), (pipeline.decode_latents(latents), predicted)):
        images += row
        captions += [f"{'original' if row is originals else 'predicted'}: {caption}" for caption in words]
        _fill_row(images, captions, columns)
    return Previews(images, captions, prompts=list(prompts), columns=columns)


def _fill_row(images: list[Any], captions: list[str], columns: int) -> None:
    """Fill the last row with blank images."""
    from PIL import Image

    while len(images) % columns:
        images.append(Image.new("RGB", images[0].size, "white"))
        captions.append("")
