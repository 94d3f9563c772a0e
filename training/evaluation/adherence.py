"""How well generated images follow what they were generated for: prompts of posters, briefs, controls, originals.

N images, C control channels, R resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.common.poster_domain import GRAMMAR
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_on_device
from training.core.options import Options, option
from training.evaluation.data import EvaluationData
from training.evaluation.generated import Generated
from training.metrics.captions import alignment_metrics, same_pairs
from training.metrics.control import ControlReader, control_iou, in_standard_errors, others
from training.metrics.cycle import cycle_metrics, palette_distance
from training.metrics.generators import ControlledGenerator, ImageGenerator
from training.metrics.images import psnr, ssim
from training.metrics.posters import measure_posters

BATCH = 16
Rows = Sequence[Mapping[str, Any]]


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
    generator: ImageGenerator, generated: Generated, data: EvaluationData, config: AdherenceConfig, device: str | None
) -> dict[str, float]:
    """Compute every measurement that the model and its data allow.

    Raises:
        UserError: a model of the config does not exist or does not read these images.
    """
    found: dict[str, float] = {}
    if generator.takes_images:
        found |= reconstruction_metrics(generated)
    if generator.takes_captions and data.has_briefs:
        found |= measure_posters(generated.images, *_briefs_and_images(generated, data))
    if generator.takes_captions and config.scorer:
        captions = [item["caption"] for item in generated.items]
        found |= caption_score(generated.images, captions, config.scorer, device)
    if generator.takes_briefs and config.reader:
        found |= brief_metrics(generated, data, config.reader, device)
    if generator.takes_controls and config.reader:
        assert isinstance(generator, ControlledGenerator)
        found |= control_adherence(generator, generated, config.reader)
    return found


def reconstruction_metrics(generated: Generated) -> dict[str, float]:
    """Compute the mean PSNR (dB) and SSIM of reconstructions and their originals."""
    values: dict[str, list[float]] = {"psnr": [], "ssim": []}
    for start in range(0, len(generated.images), BATCH):
        batch = slice(start, start + BATCH)
        originals = torch.stack([item["pixel_values"] for item in generated.items[batch]])
        restored = pixels_of(generated.images[batch])
        values["psnr"] += psnr(restored, originals).tolist()
        values["ssim"] += ssim(restored, originals).tolist()
    return {name: sum(some) / len(some) for name, some in values.items()}


def caption_score(
    images: Sequence[Image.Image], captions: Sequence[str], scorer: str, device: str | None
) -> dict[str, float]:
    """Compute the mean cosine of images and their captions, and of images and captions of other images (shuffled)."""
    similarity = _scorer(scorer, device)(images, captions)
    metrics = alignment_metrics(similarity, same_pairs(captions))
    return {f"caption_{name}": value for name, value in metrics.items() if math.isfinite(value)}


def brief_metrics(generated: Generated, data: EvaluationData, reader_path: str, device: str | None) -> dict[str, float]:
    """Compute `cycle_metrics` of generated posters, and those of the real posters of the same briefs (`real_…`).

    The values for real posters show the errors of the reader alone.
    """
    reader = load_on_device(reader_path, device)
    if getattr(reader, "encoder", None) is None or getattr(reader, "abstractor", None) is None:
        raise UserError(f"--reader {reader_path} cannot read posters; give a train_abstractor.py run with --encoder")
    rows, real = _briefs_and_images(generated, data)
    metrics = _cycle(generated.images, reader, rows)
    return metrics | {f"real_{name}": value for name, value in _cycle(real, reader, rows).items()}


def control_adherence(generator: ControlledGenerator, generated: Generated, reader_path: str) -> dict[str, float]:
    """Compute how well images agree with their controls (IoU), in comparison with images of other controls.

    `base_iou` is that of images without control, `real_iou` that of the real images of the controls, and
    `gain_in_standard_errors` the difference of `control_iou` and `shuffled_iou`.
    """
    net = generator.pipeline.controlnet.config
    reader = ControlReader(reader_path, net.control_kind, net.control_names, net.conditioning_channels)
    reader.module.to(generator.pipeline.device)
    controls = torch.stack([item["conditioning_pixel_values"] for item in generated.items])
    real = torch.stack([item["pixel_values"] for item in generated.items])
    mismatched = [{**item, "conditioning_pixel_values": own} for item, own in zip(generated.items, others(controls))]
    images = {
        "control": pixels_of(generated.images),
        "shuffled": pixels_of(_generate(generator, mismatched)),
        "base": pixels_of(_generate(generator, generated.items, scale=0.0)),
        "real": real,
    }
    ious = {name: _in_batches(reader, pixels, controls) for name, pixels in images.items()}
    gain = ious["control"] - ious["shuffled"]
    in_errors = in_standard_errors(float(gain.sum()), float(gain.square().sum()), len(gain))
    return {f"{name}_iou": float(iou.mean()) for name, iou in ious.items()} | {"gain_in_standard_errors": in_errors}


def _in_batches(reader: ControlReader, pixels: Tensor, controls: Tensor) -> Tensor:
    return torch.cat(
        [control_iou(reader(some), own).double() for some, own in zip(pixels.split(BATCH), controls.split(BATCH))]
    )


def _generate(generator: ControlledGenerator, items: Rows, scale: float = 1.0) -> list[Image.Image]:
    generator.scale = scale
    images = []
    for start in range(0, len(items), BATCH):
        numbers = range(start, min(start + BATCH, len(items)))
        images += generator([items[number] for number in numbers], numbers)
    generator.scale = 1.0
    return images


def _briefs_and_images(generated: Generated, data: EvaluationData) -> tuple[Rows, list[Image.Image]]:
    """Return the stored row of each generated poster, and its real poster."""
    rows = data.stored_rows(len(generated.images))
    return rows, [row["image"] for row in rows]


def _cycle(images: Sequence[Image.Image], reader: Any, posters: Rows) -> dict[str, float]:
    read = reader(list(images))
    target = np.array([[row[name] for name in GRAMMAR] for row in posters])
    grammar = np.array([[numbers[name] for name in GRAMMAR] for numbers in read.grammar])
    pixels = [np.asarray(image.convert("RGB")) for image in images]
    outside = [features[1] < 0.5 for features in read.features]
    distances = [[palette_distance(p, o, row["palette"]) for row in posters] for p, o in zip(pixels, outside)]
    return cycle_metrics(
        target,
        grammar,
        np.array([row["pictures"] for row in posters]),
        np.array([counts["pictures"] for counts in read.counts]),
        np.array(distances),
    )


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """Convert images of equal size to a tensor: N 3 R R in [-1, 1]"""
    arrays = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1


def _scorer(name: str, device: str | None) -> Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]:
    """Return a function from N images and N captions to their cosines, N × N."""
    if (Path(name).expanduser() / "config.json").is_file() or not Path(name).expanduser().exists():
        return _dual_encoder(name, device)
    pipeline = load_on_device(name, device)
    if not hasattr(pipeline, "similarity"):
        raise UserError(f"--scorer {name} is a {type(pipeline).__name__}; give a run of train_image_caption.py")

    def similarity(images: Sequence[Image.Image], captions: Sequence[str]) -> np.ndarray:
        return pipeline.similarity(list(images), list(captions)).double().cpu().numpy()

    return similarity


def _dual_encoder(name: str, device: str | None) -> Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]:
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
    def similarity(images: Sequence[Image.Image], captions: Sequence[str]) -> np.ndarray:
        vectors: dict[str, list[Tensor]] = {"images": [], "text": []}
        for start in range(0, len(images), BATCH):
            batch = slice(start, start + BATCH)
            inputs = processor(
                text=list(captions[batch]), images=list(images[batch]), padding=True, truncation=True,
                return_tensors="pt",
            ).to(model.device)  # fmt: skip
            output = model(**inputs)
            vectors["images"].append(torch.nn.functional.normalize(output.image_embeds.float(), dim=-1).cpu())
            vectors["text"].append(torch.nn.functional.normalize(output.text_embeds.float(), dim=-1).cpu())
        return (torch.cat(vectors["images"]) @ torch.cat(vectors["text"]).T).double().numpy()

    return similarity
