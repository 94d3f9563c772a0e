"""Large data: does the start of a run, or its memory, grow with the number of cached latents or of image files?"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.benchmarks.children import in_child
from training.benchmarks.inputs import BenchmarkConfig, Inputs
from training.benchmarks.launched import Start, measure_start_of_run
from training.benchmarks.results import Metric, spread

SHARD_ROWS = 512
CLASSES = 100
LATENT_SHAPE = (4, 4, 4)  # C h w
ONE_LEVEL = ("--model.block_out_channels", "[32]", "--model.attention_levels", "[0]")  # the most for 4×4 latents
LATENT_PIXELS = 16  # the side of the images that the VAE encodes to LATENT_SHAPE
IMAGE_PIXELS = 32
IMAGE_FOLDERS = 100
STEPS = 60
"""Number of steps after which memory is read: enough to open hundreds of shards"""
LIMIT = 600.0
"""Seconds to wait for a step of a run on many files before the benchmark fails."""
VAE = "vae_of_large_caches"


def measure_scale(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Measure runs on few and on many cached latents by turns, and the first and second start on many image files."""
    rows, images = ((600, 1200), 2 * IMAGE_FOLDERS) if config.quick else ((10_000, 1_000_000), 200_000)
    caches = {number: inputs.folder / f"latents_{number}" for number in rows}
    folder = inputs.folder / f"images_{images}"
    for number, cache in caches.items():
        if not (cache / "cache.json").is_file():
            print(f"making {number:,} cached latents ...", flush=True)
            in_child(config.quick, make_latent_cache, str(cache), str(inputs.folder / VAE), number)
    if not folder.is_dir():
        print(f"making {images:,} image files ...", flush=True)
        in_child(config.quick, make_image_files, str(folder), images)
    times = config.times(3)
    threads = ["--cpu_threads", str(config.thread_count)]
    return [
        *_cached_latents(inputs, caches, threads, times, 4 if config.quick else STEPS),
        *_image_files(inputs, folder, images, threads, times),
    ]


def _cached_latents(
    inputs: Inputs, caches: Mapping[int, Path], threads: Sequence[str], times: int, steps: int
) -> list[Metric]:
    """Measure the time and the memory of runs on two caches, by number of rows, in turn."""
    starts: dict[int, list[Start]] = {rows: [] for rows in caches}
    for _ in range(times):
        for rows, cache in caches.items():
            words = ["--config", str(inputs.tiny_recipe), "--dataset_name", "null", "--latent_cache", str(cache)]
            words += ["--vae", str(inputs.folder / VAE), "--resolution", str(LATENT_PIXELS), "--train_batch_size", "16"]
            words += ["--condition_on", "[caption,label]", *ONE_LEVEL, *threads]
            starts[rows].append(measure_start_of_run(words, steps=steps, limit=LIMIT))
    few, many = caches
    metrics = [
        *_times_to_first_row(f"{few:,} cached latents", starts[few]),
        *_times_to_first_row(f"{many:,} cached latents", starts[many], goal=15),
    ]
    peaks = {rows: [start.peak_mb for start in own if start.peak_mb is not None] for rows, own in starts.items()}
    if not peaks[few] or not peaks[many]:
        return metrics
    more = [large - small for small, large in zip(peaks[few], peaks[many], strict=True)]
    return [
        *metrics,
        spread(f"{few:,} cached latents: peak memory of {steps} steps", peaks[few], "MB"),
        spread(f"{many:,} cached latents: peak memory of {steps} steps", peaks[many], "MB"),
        spread(f"peak memory with {many:,} above that with {few:,}", more, "MB", 200, at_most=True),
    ]


def _image_files(inputs: Inputs, folder: Path, images: int, threads: Sequence[str], times: int) -> list[Metric]:
    """Measure the first start on a folder of images, and a second one with another output folder."""
    words = ["--config", str(inputs.tiny_recipe), "--dataset_name", "null", "--train_data_dir", str(folder)]
    words += ["--latent_cache", "null", "--vae", "pixels", "--resolution", str(IMAGE_PIXELS)]
    words += ["--condition_on", "[label]", *threads]
    first: list[Start] = []
    second: list[Start] = []
    for _ in range(times):
        # In a new cache of `datasets`, nothing is recorded about the files.
        with tempfile.TemporaryDirectory() as cache:
            for starts in (first, second):
                starts.append(measure_start_of_run(words, limit=LIMIT, variables={"HF_DATASETS_CACHE": cache}))
    return [
        *_times_to_first_row(f"{images:,} image files, first start", first, goal=60),
        *_times_to_first_row(f"{images:,} image files, second start", second, goal=20),
    ]


def _times_to_first_row(name: str, starts: Sequence[Start], goal: float | None = None) -> list[Metric]:
    seconds, cpu_seconds = [start.seconds for start in starts], [start.cpu_seconds for start in starts]
    return [
        spread(f"{name}: launch to the first metrics", seconds, "s", goal, at_most=True),
        spread(f"{name}: CPU time of that", cpu_seconds, "s"),
    ]


def make_latent_cache(folder: str, vae_folder: str, rows: int) -> None:
    """Write random latents with captions and classes as precompute_latents.py would write those of images, and the
    VAE, with its initial weights, that could have encoded them."""
    from training.core.files import write_json
    from training.data.fingerprints import vae_fingerprint
    from training.data.images import DataConfig, transform_fingerprint
    from training.data.latent_cache.format import FORMAT_VERSION, MANIFEST
    from training.models.vae_loading import load_vae

    if not Path(vae_folder).is_dir():
        save_vae(vae_folder)
    cache = Path(folder)
    facts = {
        "format_version": FORMAT_VERSION,
        "vae": {"name": vae_folder, "fingerprint": vae_fingerprint(load_vae(vae_folder))},
        "transform": transform_fingerprint(DataConfig(resolution=LATENT_PIXELS)),
        "resolution": LATENT_PIXELS,
        "latent_shape": list(LATENT_SHAPE),
        "storage_dtype": "float16",
        "mixed_precision": "no",
        "flips": False,
        "shard_rows": SHARD_ROWS,
        "seed": 0,
        "captions": True,
        "label_names": [f"class {number}" for number in range(CLASSES)],
    }
    request = hashlib.sha256(json.dumps([facts, rows]).encode()).hexdigest()
    split = {"rows": rows, "dataset": request, "request": request, "shards": _write_shards(cache, rows, request)}
    # The cache is complete with this file.
    write_json(cache / MANIFEST, {**facts, "splits": {"train": split}})


def _write_shards(cache: Path, rows: int, request: str) -> list[Any]:
    """Write the shards of the split, and return their entries in the manifest."""
    import torch

    from training.data.latent_cache.format import complete_shard, rows_of_shards, shard_name, write_shard

    generator = torch.Generator().manual_seed(0)
    notes = []
    for number, own in enumerate(rows_of_shards(rows, None, SHARD_ROWS)):
        row = torch.arange(own[0], own[-1] + 1)
        shape = (len(row), 1, *LATENT_SHAPE)  # one variant: no mirrored images
        tensors = {
            "mean": torch.randn(shape, generator=generator).half(),
            "logvar": torch.full(shape, -6.0, dtype=torch.float16),
            "label": row % CLASSES,
            "row": row,
        }
        captions = [f"image {index} of class {index % CLASSES}, which has a caption of usual length" for index in own]
        file = cache / "train" / shard_name(number)
        write_shard(file, tensors, captions, request)
        notes.append(complete_shard(file, request, verify=False))
    return notes


def save_vae(folder: str) -> None:
    """Save a small VAE of Diffusers that encodes LATENT_PIXELS² images to LATENT_SHAPE."""
    import torch
    from diffusers import AutoencoderKL

    from training.core.files import replacing_folder

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_SHAPE[0],
        sample_size=LATENT_PIXELS,
    )
    with replacing_folder(folder) as unfinished:
        vae.save_pretrained(unfinished)


def make_image_files(folder: str, count: int) -> None:
    """Write small PNG files, each another image, in IMAGE_FOLDERS folders, which are their classes."""
    unfinished = Path(f"{folder}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    random, side = np.random.default_rng(0), IMAGE_PIXELS // 4
    for number in range(IMAGE_FOLDERS):
        own = unfinished / f"class_{number:03}"
        own.mkdir(parents=True)
        tiles = random.integers(0, 256, (len(range(number, count, IMAGE_FOLDERS)), 4, 4, 3), dtype=np.uint8)
        for place, pixels in enumerate(tiles.repeat(side, axis=1).repeat(side, axis=2)):
            Image.fromarray(pixels).save(own / f"{place:06}.png", compress_level=1)
    unfinished.rename(folder)
