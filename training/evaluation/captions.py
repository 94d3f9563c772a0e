"""Measurements of a model of images and captions: captioning, drawing and retrieval, on training or held-out pairs.

Held-out pairs whose image is also in the training split, with another caption, are left out and counted. If an image
has several captions, BLEU and chrF use all of them, and all other metrics the first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.tools.cli import UserError
from pipelines.tools.grids import image_grid
from training.core.batches import fetch, to_device
from training.core.draws import SampleKey
from training.core.exchange import ALONE, Exchange
from training.core.options import Options, option
from training.core.previews import save_png
from training.data.captions import CaptionDataConfig, CaptionedImages, captions_of, load_captioned
from training.data.tokenization import CaptionTokens
from training.evaluation.data import NamesData, data_settings
from training.metrics.captions import (
    alignment_metrics,
    best_constant_caption,
    caption_scores,
    perplexity,
    retrieval_metrics,
    same_pairs,
)
from training.metrics.images import psnr, ssim, to_pil
from training.objectives.captions import token_losses

BATCH = 64
SHOWN = 8
SAMPLED_PAIRS = 64


@dataclass
class CaptionOptions(Options):
    """How captions are generated (only for models of images and captions)."""

    max_pairs: int = option(0, at_least=0)
    """Maximum number of pairs of images and captions, counted from the first; 0 uses all"""
    num_beams: int = option(1, at_least=1)
    """Number of beams for generating captions; 1 decodes greedily"""
    num_candidates: int = option(1, at_least=1)
    """Number of captions sampled per image, of which the one most similar to all others is used; 1 disables sampling"""
    num_pairs: int = option(8, at_least=1)
    """Number of new image–caption pairs in invented_pairs.png (only for models with a latent prior)"""
    pictures: str | None = option(None)
    """Folder for PNG files of reconstructions, drawings and new image–caption pairs; if unset, none are written"""


class CaptionConfig(NamesData, Protocol):
    """The settings that the measurement uses."""

    model: str
    split: str
    seed: int
    max_pairs: int
    num_beams: int
    num_candidates: int
    num_pairs: int
    pictures: str | None


def is_captioner(pipeline: Any) -> bool:
    """Return whether a pipeline generates captions of images."""
    return hasattr(pipeline, "caption") and hasattr(pipeline, "draw")


def measure_captions(
    pipeline: Any, settings: Mapping[str, Any], config: CaptionConfig, exchange: Exchange = ALONE
) -> dict[str, Any]:
    """Compute metrics of captions, perplexity, retrieval, alignment and reconstruction on one split.

    Every process calls it, measures its share of the pairs, and gets the result.

    Args:
        settings: settings of the model's run, empty without one.

    Raises:
        UserError: the data do not exist, or no pairs are held out.
    """
    train, held_out = data_of(config, settings, pipeline, exchange)
    if config.split not in ("train", "validation"):
        raise UserError(f"--split {config.split}: the pairs of a run are those of train or of validation")
    data = train if config.split == "train" else held_out
    if data is None:
        raise UserError(f"the data of {config.model} has no held-out pairs; use --split train")
    rows = list(range(len(data)))
    if data is held_out:
        known = set(_names_of_all(train, exchange))
        seen = [name in known for name in _names_of_all(data, exchange)]
        rows = [row for row in rows if not seen[row]]
        if not rows:
            raise UserError(
                f"all {len(data):,} held-out images of {config.model} are also training images; use --split train"
            )
    rows = rows[: config.max_pairs or None]
    results = _over_batches(pipeline, data, rows, config, exchange)
    left_out = {"left_out": sum(seen)} if data is held_out else {}
    candidates = list(captions_of(train.captioned, train.config.caption_column))
    constant, bleu = best_constant_caption(candidates, results["references"], exchange)
    results |= {"constant_caption": constant, "constant_caption_bleu_4": bleu}
    return exchange.on_main(lambda: left_out | _metrics(pipeline, data, rows, results, config))


def _metrics(
    pipeline: Any,
    data: CaptionedImages,
    rows: Sequence[int],
    results: dict[str, Any],
    config: CaptionConfig,
) -> dict[str, Any]:
    references, predictions = results.pop("references"), results.pop("predictions")
    first = [own[0] for own in references]
    similarity, matches = results.pop("similarity"), same_pairs(first, results.pop("image_names"))
    metrics: dict[str, Any] = {
        "pairs": len(rows),
        **caption_scores(predictions, references),
        "exact_captions": sum(a in map(_plain, own) for a, own in zip(predictions, references)) / len(rows),
        **results,
        **retrieval_metrics(similarity, matches),
        **alignment_metrics(similarity, matches, config.seed),
        **_new_pairs(pipeline, config.seed),
    }
    if config.pictures:
        _save_images(pipeline, data, rows, predictions, config)
    return metrics


def data_of(
    config: CaptionConfig, settings: Mapping[str, Any], pipeline: Any, exchange: Exchange = ALONE
) -> tuple[CaptionedImages, CaptionedImages | None]:
    """Return the pairs that the run was trained on and those that it held out. Every process calls it. Raises
    UserError."""
    chosen = data_settings(config, settings, CaptionDataConfig.__dataclass_fields__)
    chosen |= {"resolution": pipeline.model.config.sample_size, "image_fit": pipeline.config.image_fit}
    chosen |= {"image_interpolation_mode": pipeline.config.image_interpolation_mode}
    # Images are not flipped and are cropped at their centre, as in the pipeline.
    chosen |= {"random_flip": False, "center_crop": True, "crop_scale": 1.0}
    chosen |= exchange.on_main(CaptionDataConfig(**chosen).pinned)
    return load_captioned(CaptionDataConfig(**chosen), settings.get("seed", 0), every_caption=True)


def image_names(batch: Mapping[str, Any]) -> list[str]:
    """Return a name for each image of a batch; equal images have equal names."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch["pixel_values"].contiguous()]


def _names_of_all(data: CaptionedImages, exchange: Exchange) -> list[str]:
    return exchange.map(lambda rows: image_names(_batch(data, rows)), len(data), BATCH)


def _batch(data: CaptionedImages, rows: Sequence[int]) -> Mapping[str, Any]:
    return fetch(data, [SampleKey(row, 0) for row in rows])


def _references(batch: Mapping[str, Any]) -> list[list[str]]:
    """Return all captions of each image."""
    return [own if isinstance(own, list) else [own] for own in batch["caption"]]


def _plain(text: str) -> str:
    """Normalize a caption like the predicted ones: lower case, single spaces."""
    return " ".join(text.lower().split())


def _over_batches(
    pipeline: Any, data: CaptionedImages, rows: Sequence[int], config: CaptionConfig, exchange: Exchange
) -> dict[str, Any]:
    """Return captions, similarities of latents and mean metrics over the pairs of `rows`."""
    tokens = CaptionTokens(pipeline.tokenizer, pipeline.model.config.max_length, "longest")

    def measured(numbers: Sequence[int]) -> _Batch:
        return _measured(pipeline, tokens, _batch(data, [rows[number] for number in numbers]), numbers[0], config)

    batches = exchange.map_batches(measured, len(rows), BATCH)
    sums = dict.fromkeys(batches[0].sums, 0.0)
    for batch in batches:
        sums = {name: value + batch.sums[name] for name, value in sums.items()}
    similarity = torch.cat([batch.image for batch in batches]) @ torch.cat([batch.caption for batch in batches]).T
    return {
        "references": [own for batch in batches for own in batch.references],
        "predictions": [caption for batch in batches for caption in batch.predictions],
        "image_names": [name for batch in batches for name in batch.image_names],
        "similarity": similarity.numpy().astype(np.float64),
        "caption_loss": sums["from_image"] / sums["tokens"],
        "perplexity": perplexity(sums["from_image"], sums["tokens"]),
        "repeated_perplexity": perplexity(sums["from_caption"], sums["tokens"]),
        **{name: sums[name] / len(rows) for name in ("psnr", "ssim", "drawn_psnr")},
    }


@dataclass(frozen=True)
class _Batch:
    """What is measured of a batch of pairs.

    Attributes:
        image, caption: normalized latents of the images and of their captions, B D.
        sums: sums over the pairs, and over the tokens of their captions.
    """

    references: list[list[str]]
    predictions: list[str]
    image_names: list[str]
    image: Tensor
    caption: Tensor
    sums: dict[str, float]


@torch.no_grad()
def _measured(
    pipeline: Any, tokens: CaptionTokens, batch: Mapping[str, Any], first: int, config: CaptionConfig
) -> _Batch:
    """Measure a batch of pairs, the first of which has the number `first`."""
    model, device = pipeline.model, pipeline._execution_device
    pixels, references = batch["pixel_values"].to(device), _references(batch)
    text = to_device(tokens([own[0] for own in references]), device)
    ids, mask = text["input_ids"], text["attention_mask"]
    image, caption = (posterior.mean for posterior in model(pixels, ids, mask))
    predictions = pipeline.caption(
        (pixels + 1) / 2,
        num_beams=config.num_beams,
        num_candidates=config.num_candidates,
        generator=[torch.Generator().manual_seed(config.seed + first + i) for i in range(len(pixels))],
    )
    losses = {name: token_losses(model.caption_logits(own, ids), ids, mask) for name, own in (
        ("from_image", image), ("from_caption", caption),
    )}  # fmt: skip
    decoded, drawn = model.decode_image(image), model.decode_image(caption)
    sums = {
        **{name: float(own.sum()) for name, (own, _) in losses.items()},
        "tokens": float(losses["from_image"][1].sum()),
        "psnr": float(psnr(decoded, pixels).sum()),
        "ssim": float(ssim(decoded, pixels).sum()),
        "drawn_psnr": float(psnr(drawn, pixels).sum()),
    }
    latents = [torch.nn.functional.normalize(own.float(), dim=1).cpu() for own in (image, caption)]
    return _Batch(references, list(predictions), image_names(batch), latents[0], latents[1], sums)


def _new_pairs(pipeline: Any, seed: int) -> dict[str, float]:
    """Compute how well the captions of new pairs fit their images: the mean cosine after encoding both again."""
    if pipeline.prior is None:
        return {}
    generators = [torch.Generator().manual_seed(seed + i) for i in range(SAMPLED_PAIRS)]
    pairs = pipeline.sample(SAMPLED_PAIRS, generator=generators, output_type="pt")
    fits = [i for i, caption in enumerate(pairs.captions) if caption]
    if len(fits) < 2:
        return {}
    cosines = pipeline.similarity(pairs.images[fits], [pairs.captions[i] for i in fits]).diag()
    return {
        "invented_alignment": float(cosines.mean()),
        "invented_alignment_standard_error": float(cosines.std() / math.sqrt(len(fits))),
    }


def _save_images(
    pipeline: Any,
    data: CaptionedImages,
    rows: Sequence[int],
    predictions: Sequence[str],
    config: CaptionConfig,
) -> None:
    """Save reconstructions, generated images and new pairs as PNGs."""
    folder = Path(config.pictures or "")
    shown = min(SHOWN, len(predictions))
    step = len(predictions) // shown
    places = [i * step for i in range(shown)]  # spread over the data, because neighbouring rows are often similar
    batch = fetch(data, [SampleKey(rows[place], 0) for place in places])
    originals = pipeline.in_proportion([to_pil(image) for image in batch["pixel_values"]])
    latents = pipeline.encode_images((batch["pixel_values"] + 1) / 2)
    restored: list[Image.Image] = pipeline.decode_latents(latents)
    predicted = [f"predicted: {predictions[place]}" for place in places]
    captions = [own[0] for own in _references(batch)]
    references = [f"reference: {text}" for text in captions]
    save_png(
        _one_above_the_other(originals, references, restored, predicted), folder / f"{config.split}_reconstructions.png"
    )
    drawn = pipeline.draw(captions).images
    titles = ["original image"] * shown
    save_png(_one_above_the_other(drawn, captions, originals, titles), folder / f"{config.split}_drawings.png")
    if pipeline.prior is not None:
        generators = [torch.Generator().manual_seed(config.seed + i) for i in range(config.num_pairs)]
        pairs = pipeline.sample(config.num_pairs, generator=generators)
        save_png(image_grid(pairs.images, pairs.captions), folder / "invented_pairs.png")


def _one_above_the_other(
    above: Sequence[Image.Image], words: Sequence[str], below: Sequence[Image.Image], words_below: Sequence[str]
) -> Image.Image:
    """Make a grid with each image above its counterpart, and captions; wide images are arranged in shorter rows."""
    columns = len(above) if above[0].width < 2 * above[0].height else math.ceil(len(above) / 2)
    images: list[Image.Image] = []
    captions: list[str] = []
    for start in range(0, len(above), columns):
        row = slice(start, start + columns)
        images += [*above[row], *below[row]]
        captions += [*words[row], *words_below[row]]
    return image_grid(images, captions, columns=columns)
