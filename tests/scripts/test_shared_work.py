"""Several processes share the search for copies and other measurements, with the results of one process."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import forget_accelerate
from tests.scripts.test_evaluate import FLAGS, images, saved  # noqa: F401  (a fixture)
from tests.support.ranks import forked_ranks
from tests.support.tiny_models import tiny_vae
from training import evaluate
from training.core.exchange import Exchange
from training.data.images import DataConfig, ImageDataset
from training.engine.launch import LaunchConfig, exchange_of, start_accelerator
from training.evaluation.copies import KeptThumbnails, copy_encoders, find_copies
from training.evaluation.data import RealImages, plain_images
from training.metrics.captions import best_constant_caption
from training.metrics.features import FeatureExtractor, open_extractor
from training.metrics.memorization import CopySearch, Similarity, calibration_rows
from training.metrics.neighbours import BLOCK
from training.metrics.posters import measure_posters
from training.metrics.quality import measure_floor
from training.models.autoencoder import measure_latents

TRAINING, HELD_OUT, GENERATED = 2 * BLOCK + 100, 130, 21


def drawn(count: int, seed: int) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    small = [Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((16, 16), Image.Resampling.BICUBIC) for image in small]


def opened(count: int, seed: int) -> ImageDataset:
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": drawn(count, seed)}, features=features)
    return plain_images(rows, DataConfig(resolution=16, image_column="image"))


class Recorded(RealImages):
    """Writes the place of each image that it reads into a file."""

    file: Path

    def images(self, places: Sequence[int]) -> list[Image.Image]:
        with self.file.open("a") as file:
            file.writelines(f"{place}\n" for place in places)
        return super().images(places)


def described(similar: Similarity) -> list:
    found = similar.neighbours
    digest = hashlib.sha256(found.distances.numpy().tobytes() + found.rows.numpy().tobytes())
    return [similar.report.to_json(), digest.hexdigest()]


def among_themselves(exchange: Exchange) -> Similarity:
    """Compare vectors with training vectors, whose threshold is set by training vectors: each is not its own copy."""
    training = torch.randn(TRAINING, 8, generator=torch.Generator().manual_seed(0))
    rows = calibration_rows(TRAINING)
    among = CopySearch("latents", {"": training[:9] + 0.01}, training[rows], rows)
    for block in exchange.share(TRAINING, BLOCK):
        among.add(training[block.start : block.stop], block.start)
    return among.results(torch.zeros(len(rows), dtype=torch.bool), exchange)[""]


def of_posters(exchange: Exchange) -> dict[str, float]:
    """Measure 40 posters that are noise, for briefs of two kinds."""
    own = {"background": "cream", "title_position": "top", "pictures": 1}
    briefs = [{**own, "palette": ["#f5f0e1", "#c8102e", f"#{40 + i:02x}2040"]} for i in range(40)]
    generated, real = ([image.resize((64, 64)) for image in drawn(40, seed)] for seed in (5, 6))
    return measure_posters(generated, briefs, real, exchange)


def of_captions(exchange: Exchange) -> list:
    texts = [f"a {color} poster of {number} pictures" for color in ("red", "blue") for number in range(20)]
    return [*best_constant_caption(texts, [[text] for text in texts[:30]], exchange)]


def search(folder: Path, training: ImageDataset, held_out: ImageDataset, extractor: FeatureExtractor) -> int:
    """Search for copies as training/evaluate.py and a run do, and write the results of this process into a folder."""
    forget_accelerate()
    exchange = exchange_of(start_accelerator(LaunchConfig(cpu_threads=1)))
    known = Recorded("train", training, len(training))
    known.file = folder / f"read_{exchange.rank}.txt"
    generated = [*drawn(GENERATED - 4, 2), *known.images(range(4))]
    known.file.unlink()
    sets = {"generated": generated, "replayed": generated[5:12]}
    vae = tiny_vae()
    measure_latents(vae, training, 140, torch.device("cpu"), lambda: None, exchange)
    model: Any = SimpleNamespace(pipeline=SimpleNamespace(vae=vae))
    encoders = copy_encoders(["latents"], model, extractor)
    real = RealImages("validation", held_out, HELD_OUT)
    found = find_copies(sets, known, real, encoders, exchange)
    read = known.file.read_text().split()
    kept = KeptThumbnails(known, real, exchange, lambda: None)
    reports = [kept.report(some, exchange, lambda: None).to_json() for some in (generated, generated[:3], generated)]
    features = RealImages("train", training, 50).features(extractor, exchange)
    results = {
        "copies": {name: [described(similar) for similar in own] for name, own in found.items()},
        "of a run": reports,
        "among training images": described(among_themselves(exchange)),
        "features": hashlib.sha256(features.numpy().tobytes()).hexdigest(),
        "latents": [vae.config.latents_mean, vae.config.latents_std],
        "floor": measure_floor(features[:, :5], 20, exchange=exchange),
        "posters": of_posters(exchange),
        "constant caption": of_captions(exchange),
    }
    assert reports[0] == reports[2]
    (folder / f"results_{exchange.rank}.json").write_text(json.dumps(results))
    known.file.write_text("\n".join(read))
    return 0


@pytest.mark.slow
def test_the_copies_that_several_processes_find_are_those_that_one_finds(tmp_path):
    training, held_out = opened(TRAINING, 0), opened(HELD_OUT, 1)
    extractor = open_extractor(resolution=32)
    found = {}
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        forget_features()
        forked_ranks(lambda folder=folder: search(folder, training, held_out, extractor), folder / "output.txt", count)
        results = [(folder / f"results_{rank}.json").read_text() for rank in range(count)]
        assert len(set(results)) == 1
        found[count] = json.loads(results[0])
        read = [[int(place) for place in (folder / f"read_{rank}.txt").read_text().split()] for rank in range(count)]
        assert sorted(place for own in read for place in own) == list(range(TRAINING))
        assert max(map(len, read)) <= -(-3 // count) * BLOCK  # three blocks
    assert found[2] == found[1]
    assert found[3] == found[1]
    pixels = found[1]["copies"]["generated"][0][0]
    assert (pixels["num_training"], pixels["exact_copies"]) == (TRAINING, 4)
    assert found[1]["of a run"][0]["exact_copies"] == 4


DIFFUSION = ("--num_inference_steps", "2", "--inpaint_images", "7")
CONTROLLED = ("--num_inference_steps", "1", "--conditioning_image_column", "[text_mask,image_mask]", "--split", "test")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reader", "words"),
    [("captioned", "", DIFFUSION), ("image_caption", "", ()), ("controlnet", "layout_encoder", CONTROLLED)],
)
def test_an_evaluation_by_several_processes_is_that_of_one(tmp_path, images, posters, name, reader, words):  # noqa: F811
    model = saved(name, tmp_path)
    data = posters if reader else images
    words = ("--model", str(model), "--dataset_name", str(data), "--replay_images", "7", *words)
    words += ("--reader", str(saved(reader, tmp_path))) if reader else ()
    words += ("--scorer", str(saved("image_caption", tmp_path))) if name == "captioned" else ()
    found = []
    for count in (1, 3):
        output = tmp_path / f"{count}.json"
        forget_features()
        action = functools.partial(evaluated_by, [*FLAGS, *words, "--output", str(output)])
        forked_ranks(action, tmp_path / "log.txt", count)
        found.append(json.loads(output.read_text(encoding="utf-8")))
        assert ("caption_alignment" in found[-1]["metrics"]) == (name == "captioned")
        found[-1].pop("images_per_second")
    assert found[1] == found[0]


def evaluated_by(words: list[str]) -> int:
    forget_accelerate()
    return evaluate.main(words)


def forget_features() -> None:
    """Delete the features that an earlier process has stored."""
    for file in (Path(datasets.config.HF_DATASETS_CACHE) / "halftone").glob("features-*"):
        file.unlink()
