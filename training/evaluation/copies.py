"""Copies of training images: among generated images, among invented pairs, and for the captions of training images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.common.latents import image_channels_of
from training.core.exchange import ALONE, Exchange
from training.core.options import Options, option
from training.core.previews import save_png
from training.evaluation.data import BATCH, EvaluationData, RealImages
from training.evaluation.generated import map_shown
from training.metrics.features import FeatureExtractor
from training.metrics.generators import DrawingModel, ImageGenerator
from training.metrics.images import pixels_of
from training.metrics.memorization import (
    FEWEST_HELD_OUT,
    CopyReport,
    CopySearch,
    Similarity,
    calibration_rows,
    contact_sheet,
    replay_report,
    replay_verdict,
    verdict,
)
from training.metrics.neighbours import BLOCK, Neighbours, thumbnails

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
    sets: CopySets,
    data: EvaluationData,
    spaces: Mapping[str, Encoder],
    sheet: str | None,
    default_sheet: str | None,
    exchange: Exchange,
) -> dict[str, Any]:
    """Search for copies, and draw the closest pairs; every process calls it, and all get the result.

    Args:
        spaces: names of spaces in addition to `pixels`, and functions from images to vectors.
        sheet: file for the closest pairs.
        default_sheet: file for them if `sheet` is None and there are copies.
    """
    training = data.training
    assert training is not None
    named = {"generated": sets.generated, "replayed": sets.replayed, "invented": sets.invented}
    found = find_copies({k: v for k, v in named.items() if v}, training, data.held_out, spaces, exchange)
    return exchange.on_main(lambda: _results(found, sets, data, sheet, default_sheet))


def _results(
    found: Mapping[str, Sequence[Similarity]],
    sets: CopySets,
    data: EvaluationData,
    sheet: str | None,
    default_sheet: str | None,
) -> dict[str, Any]:
    training, first = data.training, found["generated"][0]
    assert training is not None
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
    sets: Mapping[str, Images],
    training: RealImages,
    held_out: RealImages | None,
    spaces: Mapping[str, Encoder],
    exchange: Exchange = ALONE,
) -> dict[str, list[Similarity]]:
    """Compare sets of images with all training images, of which a block is in memory at a time.

    The processes divide the training images among them: each reads, encodes and compares its blocks.

    Args:
        held_out: real images that were not trained on, which set the threshold if there are enough of them.
        spaces: names of spaces in addition to `pixels`, and functions from images to vectors.

    Returns:
        For each set the verdicts in pixels and in each of `spaces`.
    """
    encoders: dict[str, Encoder] = {"pixels": thumbnails, **spaces}
    real, own_rows = calibration_images(training, held_out)
    real_vectors = encoded(real.images, len(real), encoders, exchange)
    vectors = {name: encoded(_taken_from(images), len(images), encoders, exchange) for name, images in sets.items()}
    searches = {
        space: CopySearch(space, {name: own[space] for name, own in vectors.items()}, real_vectors[space], own_rows)
        for space in encoders
    }

    def compare_own_blocks() -> None:
        for first_row, block in blocks_of(training, encoders, exchange):
            for space, search in searches.items():
                search.add(block[space], first_row)

    exchange.each(compare_own_blocks)
    duplicates = searches["pixels"].duplicates(exchange)
    found = [search.results(duplicates, exchange) for search in searches.values()]
    return {name: [results[name] for results in found] for name in sets}


class KeptThumbnails:
    """Searches for copies in pixels several times; the training images are read once, each process keeps its share.

    Args:
        held_out: real images that were not trained on, which set the threshold if there are enough of them.
        poll: called before each batch of images is read; it may raise to stop.
    """

    def __init__(self, training: RealImages, held_out: RealImages | None, exchange: Exchange, poll: Callable[[], None]):
        encoders: dict[str, Encoder] = {"pixels": thumbnails}
        real, self._own_rows = calibration_images(training, held_out)
        self._real: Tensor | Neighbours = encoded(real.images, len(real), encoders, exchange, poll)["pixels"]
        self._blocks: list[tuple[int, Tensor]] = []

        def read_own_blocks() -> None:
            for first_row, block in blocks_of(training, encoders, exchange, poll):
                self._blocks.append((first_row, block["pixels"]))

        exchange.each(read_own_blocks)

    def report(self, images: Images, exchange: Exchange, poll: Callable[[], None]) -> CopyReport:
        """Compare generated images, which are the same on every process, with all training images."""
        search = CopySearch("pixels", {"": thumbnails(images)}, self._real, self._own_rows)

        def compare_own_blocks() -> None:
            for first_row, block in self._blocks:
                poll()
                search.add(block, first_row)

        exchange.each(compare_own_blocks)
        self._real = search.neighbours_of_real(exchange)  # they stay the same
        return search.results(search.duplicates(exchange), exchange)[""].report


def calibration_images(training: RealImages, held_out: RealImages | None) -> tuple[RealImages, Tensor | None]:
    """Return the real images that set the threshold, and their rows if they are training images.

    They are the held-out images, or training images if there are too few of the former.
    """
    if held_out is not None and len(held_out) >= FEWEST_HELD_OUT:
        return held_out, None
    rows = calibration_rows(len(training))
    return training.at(rows.tolist()), rows


def encoded(
    images_at: Callable[[Sequence[int]], Images],
    count: int,
    encoders: Mapping[str, Encoder],
    exchange: Exchange,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return the vectors of `count` images in each space, n D on every process; each process encodes its share.

    Args:
        images_at: returns the images at some places, from 0 to count - 1.
    """

    def vectors(places: Sequence[int]) -> list[Tensor]:
        poll()
        images = images_at(places)
        return [encode(images) for encode in encoders.values()]

    batches = exchange.map_batches(vectors, count, BATCH)
    return {space: torch.cat(parts) for space, parts in zip(encoders, zip(*batches, strict=True), strict=True)}


def blocks_of(
    training: RealImages, encoders: Mapping[str, Encoder], exchange: Exchange, poll: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield this process's blocks of the training images: the place of the first one, and their vectors by space."""
    for block in exchange.share(len(training), BLOCK):
        parts: dict[str, list[Tensor]] = {space: [] for space in encoders}
        for start in range(0, len(block), BATCH):
            poll()
            images = training.images(block[start : start + BATCH])
            for space, encode in encoders.items():
                parts[space].append(encode(images))
        yield block.start, {space: torch.cat(own) for space, own in parts.items()}


def _taken_from(images: Images) -> Callable[[Sequence[int]], Images]:
    return lambda places: [images[place] for place in places]


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
