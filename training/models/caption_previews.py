"""What a joint model of pictures and captions shows at a preview."""

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
    """Four rows: captions drawn, invented pairs (where there is a prior), pictures beside how they are reconstructed
    and captioned.

    Args:
        config: of train_image_caption.py.
        poll: called between the rows; it raises when the run is asked to stop.
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
        captions += [f"invented: {caption}" for caption in pairs.captions]
        poll()
    latents = pipeline.encode_images((batch["pixel_values"] + 1) / 2)
    told = pipeline.caption((batch["pixel_values"] + 1) / 2)
    originals = pipeline.in_proportion([to_pil(image) for image in batch["pixel_values"]])
    for row, words in ((originals, batch["caption"]), (pipeline.decode_latents(latents), told)):
        images += row
        captions += [f"{'truth' if row is originals else 'as told'}: {caption}" for caption in words]
        _fill_row(images, captions, columns)
    return Previews(images, captions, columns=columns)


def _fill_row(images: list[Any], captions: list[str], columns: int) -> None:
    """Blank pictures up to the row's end, where there are fewer than columns."""
    from PIL import Image

    while len(images) % columns:
        images.append(Image.new("RGB", images[0].size, "white"))
        captions.append("")
