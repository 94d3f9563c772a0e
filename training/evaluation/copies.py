"""Copies of training images: among generated images, among invented pairs, and for the captions of training images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.common.latents import image_channels_of
from training.core.exchange import Exchange
from training.core.options import Options, option
from training.core.previews import save_png
from training.evaluation.data import EvaluationData, RealImages
from training.evaluation.generated import map_shown
from training.metrics.features import FeatureExtractor
from training.metrics.generators import DrawingModel, ImageGenerator
from training.metrics.images import pixels_of
from training.metrics.memorization import (
    FEWEST_HELD_OUT,
    CopySearch,
    Similarity,
    calibration_rows,
    contact_sheet,
    replay_report,
    replay_verdict,
    verdict,
)
from training.metrics.neighbours import thumbnails

VAE_BATCH = 16
MOST_INVENTED = 256
Encoder = Callable[[Sequence[Image.Image]], Tensor]
Images = Sequence[Image.Image]


@dataclass
class CopyOptions(Options):
    """How copies of training images are searched for."""

    copy_spaces: list[str] = option(["pixels", "latents"], choices=("pixels", "latents", "features"))
    """Where copies of training images are searched for among the generated ones: in pixels, in the latents of the
    model's autoencoder, in the features of the extractor; '[]' searches nowhere"""
    replay_images: int = option(100, at_least=0)
    """Number of training images whose caption, brief or control image is given to the model, to count how often it
    returns the training image itself; 0 skips this"""
    copies_sheet: str | None = option(None)
    """File with the generated images that are closest to training images (PNG); if unset, copies.png beside
    the results if anything looks like a copy"""


@dataclass(frozen=True)
class CopySets:
    """Generated images that are compared with the training images.

    Args:
        generated: images for the conditions of the evaluation.
        replayed: images for the conditions of the training images at `places`.
        given: what these conditions are, in words.
        invented, captions: images and captions of pairs that an image–caption model has invented.
    """

    generated: Images
    replayed: Images = ()
    places: Sequence[int] = ()
    given: str = ""
    invented: Images = ()
    captions: Sequence[str] = ()


def generate_sets(
    generator: ImageGenerator | None,
    images: Images,
    data: EvaluationData,
    config: CopyOptions,
    batch_size: int,
    exchange: Exchange,
) -> CopySets | None:
    """Generate what is compared in addition to `images`; every process calls it. None if nothing can be compared."""
    if not config.copy_spaces or data.training is None or (generator is not None and generator.takes_images):
        return None  # an autoencoder has to copy
    if generator is None:
        return CopySets(images)
    model, first = generator, len(images)
    places = data.training.spread(config.replay_images) if model.given else []

    def replay(numbers: Sequence[int]) -> list[Image.Image]:
        items = data.training_items([places[number] for number in numbers])
        return model(items, [first + number for number in numbers])

    replayed = map_shown(exchange, replay, len(places), batch_size, "for training rows")
    invented: list[tuple[Image.Image, str]] = []
    if isinstance(model, DrawingModel) and model.invents:
        invented = map_shown(exchange, model.invent, min(first, MOST_INVENTED), batch_size, "invented")
    pairs = [image for image, _ in invented], [caption for _, caption in invented]
    return CopySets(images, replayed, places, model.given, *pairs)


def measure_copies(
    sets: CopySets, data: EvaluationData, spaces: Mapping[str, Encoder], sheet: str | None, default_sheet: str | None
) -> dict[str, Any]:
    """Search for copies, and draw the closest pairs; on the main process only.

    Args:
        spaces: names of spaces in addition to `pixels`, and functions from images to vectors.
        sheet: file for the closest pairs.
        default_sheet: file for them if `sheet` is None and there are copies.
    """
    training = data.training
    assert training is not None
    named = {"generated": sets.generated, "replayed": sets.replayed, "invented": sets.invented}
    held_out = [image for batch in data.held_out.batches() for image in batch] if data.held_out else []
    found = find_copies({k: v for k, v in named.items() if v}, training, held_out, spaces)
    first = found["generated"][0]
    if sheet := sheet or (default_sheet if first.report.copies else None):
        save_png(contact_sheet(first, sets.generated, lambda row: training.images([row])[0]), sheet)
    results = _reports(found["generated"])
    if "replayed" in found:
        own = [_is_own(similar.neighbours.rows[:, 0].tolist(), sets.places, data) for similar in found["replayed"]]
        replays = [replay_report(similar, torch.tensor(same)) for similar, same in zip(found["replayed"], own)]
        results["replay"] = [report.to_json() for report in replays]
        results["replay_verdict"] = replay_verdict(replays, sets.given)
    if "invented" in found:
        known = data.training_captions()
        results["invented"] = {
            **_reports(found["invented"]),
            "known_captions": sum(caption in known for caption in sets.captions) / len(sets.captions),
        }
    return results


def _reports(similar: Sequence[Similarity]) -> dict[str, Any]:
    reports = [one.report for one in similar]
    return {"copies": [report.to_json() for report in reports], "verdict": verdict(reports)}


def _is_own(nearest: Sequence[int], places: Sequence[int], data: EvaluationData) -> list[bool]:
    """Return whether each nearest training image is the one at its place, or has the same caption."""
    captions = [[item.get("caption") for item in data.training_items(rows)] for rows in (nearest, places)]
    return [
        row == place or (one is not None and one == other)
        for row, place, one, other in zip(nearest, places, *captions, strict=True)
    ]


def find_copies(
    sets: Mapping[str, Images], training: RealImages, held_out: Images, spaces: Mapping[str, Encoder]
) -> dict[str, list[Similarity]]:
    """Compare sets of images with all training images, of which a batch is in memory at a time.

    Args:
        held_out: real images that were not trained on, which set the threshold if there are enough of them.
        spaces: names of spaces in addition to `pixels`, and functions from images to vectors.

    Returns:
        For each set the verdicts in pixels and in each of `spaces`.
    """
    rows = None
    if len(held_out) < FEWEST_HELD_OUT:
        rows = calibration_rows(len(training))
        held_out = training.images(rows.tolist())
    encoders: dict[str, Encoder] = {"pixels": thumbnails, **spaces}
    searches = {
        space: CopySearch(space, {name: encode(images) for name, images in sets.items()}, encode(held_out), rows)
        for space, encode in encoders.items()
    }
    for batch in training.batches():
        for space, search in searches.items():
            search.add(encoders[space](batch))
    duplicates = searches["pixels"].duplicates()
    found = [search.results(duplicates) for search in searches.values()]
    return {name: [results[name] for results in found] for name in sets}


def copy_encoders(
    names: Sequence[str], generator: ImageGenerator | None, extractor: FeatureExtractor
) -> dict[str, Encoder]:
    """Return functions from images to vectors for the spaces of these names that the model has."""
    encoders: dict[str, Encoder] = {"features": extractor, **latent_space(generator)}
    return {name: encoders[name] for name in names if name in encoders}


def latent_space(generator: ImageGenerator | None) -> dict[str, Encoder]:
    """Return `latents` with a function from images to the latents of the model's VAE; empty without a VAE."""
    vae = getattr(getattr(generator, "pipeline", None), "vae", None)
    if vae is None:
        return {}

    channels = image_channels_of(vae)

    @torch.inference_mode()
    def encode(images: Images) -> Tensor:
        parts = []
        for start in range(0, len(images), VAE_BATCH):
            latents = vae.encode(pixels_of(images[start : start + VAE_BATCH], channels).to(vae.device, vae.dtype))
            mode = latents.latent_dist.mode() if hasattr(latents, "latent_dist") else latents.latents
            parts.append(mode.flatten(1).float().cpu())
        return torch.cat(parts)

    return {"latents": encode}
