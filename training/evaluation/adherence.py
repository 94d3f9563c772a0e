"""How well generated images follow what they were generated for: prompts of posters, briefs, controls, originals.

N images, C control channels, R resolution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.common.pixels import to_rgb
from pipelines.common.poster_domain import GRAMMAR
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_on_device
from training.core.exchange import ALONE, Exchange
from training.core.options import Options, option
from training.evaluation.data import EvaluationData
from training.metrics.captions import alignment_metrics, same_pairs
from training.metrics.control import ControlReader, control_iou, in_standard_errors, others
from training.metrics.cycle import cycle_metrics, palette_distance
from training.metrics.generators import ControlledGenerator, ImageGenerator
from training.metrics.images import pixels_of, psnr, ssim
from training.metrics.posters import is_legible, measure_posters

BATCH = 16
Rows = Sequence[Mapping[str, Any]]
Encoder = Callable[[list[Image.Image], list[str]], tuple[Tensor, Tensor]]


@dataclass
class AdherenceConfig(Options):
    """Models that read generated images."""

    reader: str | None = option(None)
    """Model that reads what a ControlNet or a poster decoder was asked for: a layout encoder, an autoencoder with a
    segmentation head, or for poster decoders a run of train_abstractor.py with --encoder"""
    scorer: str | None = option(None)
    """Model that compares generated images with their captions: a run of train_image_caption.py, or the Hub id or
    folder of a dual encoder of Transformers, such as openai/clip-vit-base-patch32"""


def measure_adherence(
    generator: ImageGenerator,
    images: Sequence[Image.Image],
    data: EvaluationData,
    config: AdherenceConfig,
    device: str | None,
    exchange: Exchange = ALONE,
) -> dict[str, float]:
    """Compute every measurement that the model and its data allow; every process calls it, and all get the result.

    Args:
        images: the generated images, in the order of the rows of `data`.

    Raises:
        UserError: a model of the config does not exist or does not read these images.
    """
    found: dict[str, float] = {}
    if generator.takes_images:
        found |= reconstruction_metrics(images, data, exchange)
    if generator.takes_captions and data.has_briefs and is_legible(images[0].size):
        rows, real = _briefs_and_images(len(images), data)
        found |= measure_posters([to_rgb(image) for image in images], rows, real, exchange)
    if generator.takes_captions and config.scorer:
        captions = exchange.map(lambda batch: [item["caption"] for item in data.items(batch)], len(images), BATCH)
        found |= caption_score(images, captions, config.scorer, device, exchange)
    if generator.takes_briefs and config.reader:
        found |= brief_metrics(images, data, config.reader, device, exchange)
    if isinstance(generator, ControlledGenerator) and config.reader:
        found |= control_adherence(generator, images, data, config.reader, exchange)
    return found


def reconstruction_metrics(
    images: Sequence[Image.Image], data: EvaluationData, exchange: Exchange = ALONE
) -> dict[str, float]:
    """Compute the mean PSNR (dB) and SSIM of reconstructions and their originals."""

    def of_batch(batch: Sequence[int]) -> list[tuple[float, float]]:
        originals = torch.stack([_in_rgb(item["pixel_values"]) for item in data.items(batch)])
        restored = pixels_of([images[number] for number in batch])
        return list(zip(psnr(restored, originals).tolist(), ssim(restored, originals).tolist(), strict=True))

    values = zip(*exchange.map(of_batch, len(images), BATCH), strict=True)
    return {name: sum(some) / len(some) for name, some in zip(("psnr", "ssim"), values, strict=True)}


def _in_rgb(pixels: Tensor) -> Tensor:
    """Return the channels of an image (C H W) as RGB, on white if it is transparent."""
    return pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]


def caption_score(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    scorer: str,
    device: str | None,
    exchange: Exchange = ALONE,
) -> dict[str, float]:
    """Compute the mean cosine of images and their captions, and of images and captions of other images (shuffled)."""
    encoder = functools.cache(lambda: _scorer(scorer, device))  # a process without a batch does not load it

    def encode(batch: Sequence[int]) -> list[Tensor]:
        vectors = encoder()([to_rgb(images[number]) for number in batch], [captions[number] for number in batch])
        return [torch.nn.functional.normalize(own.float(), dim=-1).cpu() for own in vectors]

    parts = exchange.map_batches(encode, len(images), BATCH)
    of_images, of_captions = (torch.cat(own) for own in zip(*parts, strict=True))

    def metrics() -> dict[str, float]:
        similarity = (of_images @ of_captions.T).double().numpy()
        values = alignment_metrics(similarity, same_pairs(captions))
        return {f"caption_{name}": value for name, value in values.items() if math.isfinite(value)}

    return exchange.on_main(metrics)


def brief_metrics(
    images: Sequence[Image.Image],
    data: EvaluationData,
    reader_path: str,
    device: str | None,
    exchange: Exchange = ALONE,
) -> dict[str, float]:
    """Compute `cycle_metrics` of generated posters, and those of the real posters of the same briefs (`real_…`).

    The values for real posters show the errors of the reader alone.
    """
    reader = load_reader(reader_path, device)
    rows, real = _briefs_and_images(len(images), data)
    metrics = _cycle(images, reader, rows, exchange)
    return metrics | {f"real_{name}": value for name, value in _cycle(real, reader, rows, exchange).items()}


def load_reader(path: str, device: str | None) -> Any:
    """Load a pipeline that reads the grammar of posters. Raises UserError if it is something else."""
    reader = load_on_device(path, device)
    if getattr(reader, "encoder", None) is None or getattr(reader, "abstractor", None) is None:
        raise UserError(f"--reader {path} cannot read posters; give a train_abstractor.py run with --encoder")
    return reader


def control_adherence(
    generator: ControlledGenerator,
    images: Sequence[Image.Image],
    data: EvaluationData,
    reader_path: str,
    exchange: Exchange = ALONE,
) -> dict[str, float]:
    """Compute how well images agree with their controls (IoU), in comparison with images of other controls.

    `base_iou` is that of images without control, `real_iou` that of the real images of the controls, and
    `gain_in_standard_errors` the difference of `control_iou` and `shuffled_iou`.
    """
    net = generator.pipeline.controlnet.config
    reader = ControlReader(reader_path, net.control_kind, net.control_names, net.conditioning_channels)
    reader.module.to(generator.pipeline.device)
    items = [item for batch in _batches(len(images)) for item in data.items(batch)]
    controls = torch.stack([item["conditioning_pixel_values"] for item in items])
    mismatched = [{**item, "conditioning_pixel_values": own} for item, own in zip(items, others(controls))]
    shown = {
        "control": pixels_of(images),
        "shuffled": pixels_of(_generate(generator, mismatched, exchange)),
        "base": pixels_of(_generate(generator, items, exchange, scale=0.0)),
        "real": torch.stack([item["pixel_values"] for item in items]),
    }
    ious = {name: _in_batches(reader, pixels, controls, exchange) for name, pixels in shown.items()}
    gain = ious["control"] - ious["shuffled"]
    in_errors = in_standard_errors(float(gain.sum()), float(gain.square().sum()), len(gain))
    return {f"{name}_iou": float(iou.mean()) for name, iou in ious.items()} | {"gain_in_standard_errors": in_errors}


def _batches(count: int) -> Iterator[range]:
    return (range(start, min(start + BATCH, count)) for start in range(0, count, BATCH))


def _in_batches(reader: ControlReader, pixels: Tensor, controls: Tensor, exchange: Exchange) -> Tensor:
    def of_batch(batch: Sequence[int]) -> Tensor:
        rows = list(batch)
        return control_iou(reader(pixels[rows]), controls[rows]).double()

    return torch.cat(exchange.map_batches(of_batch, len(pixels), BATCH))


def _generate(generator: ControlledGenerator, items: Rows, exchange: Exchange, scale: float = 1.0) -> list[Image.Image]:
    generator.scale = scale
    images = exchange.map(lambda batch: generator([items[n] for n in batch], batch), len(items), BATCH)
    generator.scale = 1.0
    return images


def _briefs_and_images(count: int, data: EvaluationData) -> tuple[Rows, list[Image.Image]]:
    """Return the stored row of each generated poster, and its real poster."""
    rows = data.stored_rows(count)
    return rows, [row["image"] for row in rows]


def _cycle(images: Sequence[Image.Image], reader: Any, posters: Rows, exchange: Exchange) -> dict[str, float]:
    def read(batch: Sequence[int]) -> list[tuple[list[float], int, list[float]]]:
        """Return what is read of each poster, and its distances from the palettes of all briefs."""
        own = [images[number] for number in batch]
        output = reader(own, overlays=False)
        return [
            (
                [numbers[name] for name in GRAMMAR],
                counts["pictures"],
                [palette_distance(np.asarray(to_rgb(image)), features[1] < 0.5, row["palette"]) for row in posters],
            )
            for image, numbers, counts, features in zip(own, output.grammar, output.counts, output.features)
        ]

    grammar, pictures, distances = zip(*exchange.map(read, len(images), BATCH), strict=True)
    return cycle_metrics(
        np.array([[row[name] for name in GRAMMAR] for row in posters]),
        np.array(grammar),
        np.array([row["pictures"] for row in posters]),
        np.array(pictures),
        np.array(distances),
    )


def _scorer(name: str, device: str | None) -> Encoder:
    """Return a function from N images and N captions to their vectors, N D each. Raises UserError."""
    if (Path(name).expanduser() / "config.json").is_file() or not Path(name).expanduser().exists():
        return _dual_encoder(name, device)
    pipeline = load_on_device(name, device)
    if not hasattr(pipeline, "similarity"):
        raise UserError(f"--scorer {name} is a {type(pipeline).__name__}; give a run of train_image_caption.py")
    return lambda images, captions: (pipeline.encode_images(images), pipeline.encode_captions(captions))


def _dual_encoder(name: str, device: str | None) -> Encoder:
    from transformers import AutoModel, AutoProcessor

    from pipelines.tools.devices import get_device

    try:
        model = AutoModel.from_pretrained(name, use_safetensors=True).eval().to(get_device(device))
        processor: Any = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--scorer {name} cannot be loaded ({error}); give a dual encoder of Transformers") from None
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise UserError(f"--scorer {name} is a {type(model).__name__}, which does not compare images with captions")

    @torch.inference_mode()
    def encode(images: list[Image.Image], captions: list[str]) -> tuple[Tensor, Tensor]:
        inputs = processor(text=captions, images=images, padding=True, truncation=True, return_tensors="pt")
        output = model(**inputs.to(model.device))
        return output.image_embeds, output.text_embeds

    return encode
