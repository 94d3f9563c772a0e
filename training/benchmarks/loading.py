"""Data loading alone: images per second from a folder, from the pixel cache in memory and from a latent cache."""

from __future__ import annotations

import time
from typing import Any

from training.benchmarks.children import in_child
from training.benchmarks.inputs import BenchmarkConfig, Inputs
from training.benchmarks.results import FOLDER_SPEED, Metric, spread

BATCH_SIZE = 16
RESOLUTION = 64


def measure_loading(config: BenchmarkConfig, inputs: Inputs) -> list[Metric]:
    """Measure the images that the data loader returns per second, without a network."""
    times = config.times(5)
    photos = in_child(config.quick, folder_speeds, str(inputs.photos), times)
    latents = in_child(config.quick, latent_speeds, str(inputs.latents), times)
    return [
        spread(FOLDER_SPEED, photos["folder"], "images/s"),
        spread("folder of JPEGs, 2 workers, with their start", photos["workers"], "images/s"),
        spread("pixel cache, from the second epoch on", photos["cache"], "images/s"),
        spread("latent cache", latents, "images/s"),
    ]


def folder_speeds(photos: str, times: int) -> dict[str, list[float]]:
    """Return images per second of a folder in turn: first epoch, second epoch (pixel cache), first epoch with workers.

    Every turn opens the folder again, because its pixel cache then is empty.
    """
    from training.core.parsing import parse_config
    from training.data.images import DataConfig, ImageDataset, load_split

    words = ["--train_data_dir", photos, "--resolution", str(RESOLUTION), "--validation_fraction", "0"]
    config = parse_config(DataConfig, words)
    rows = load_split(config, "train", 0)
    speeds: dict[str, list[float]] = {"folder": [], "cache": [], "workers": []}
    for _ in range(times):
        data = ImageDataset(rows, config, captions=False)
        speeds["folder"].append(images_per_second(data, workers=0))
        speeds["cache"].append(images_per_second(data, workers=0))
        speeds["workers"].append(images_per_second(ImageDataset(rows, config, captions=False), workers=2))
    return speeds


def latent_speeds(latents: str, times: int) -> list[float]:
    """Return images per second of a latent cache; the first epoch, which opens its files, is not measured."""
    from training.data.latent_cache.dataset import LatentCache

    data = LatentCache(latents).split("train", random_flip=True)
    return [images_per_second(data, workers=0) for _ in range(times + 1)][1:]


def images_per_second(data: Any, workers: int) -> float:
    """Return the speed of one epoch in the order and batches of training, on one thread in each process."""
    import torch

    from training.core.layout import BatchLayout
    from training.engine.loading import MicroBatches

    torch.set_num_threads(1)
    layout = BatchLayout(BATCH_SIZE, 1, 1)
    device = torch.device("cpu")
    batches = MicroBatches(data, layout, seed=0, strata=None, num_workers=workers, device=device)
    steps = len(data) // BATCH_SIZE
    started = time.perf_counter()
    for _ in batches.steps(0, steps):
        pass
    return steps * BATCH_SIZE / (time.perf_counter() - started)
