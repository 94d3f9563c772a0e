"""Encode the images of a dataset once, so that training needs neither the images nor the VAE.

    accelerate launch data_scripts/precompute_latents.py --vae VAE --dataset_name DATA --output_dir data/DATA_latents

The cache holds the mean and the log-variance of the latents of each image. Several processes divide the shards among
themselves (torchrun --nproc-per-node 4 data_scripts/precompute_latents.py ...) and end together. After an interruption,
run the same command again to resume after the last complete shard.

Jobs that know nothing of each other, such as the tasks of a job array, divide one cache with --num_jobs 8 --job_index I
(I from 0 to 7). The last one to finish completes the cache; a job that failed is run again.
"""

# B batch, H W pixels, V variants (as is, mirrored), C h w latents (see training/data/latent_cache/format.py).

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from data_scripts.dataset_folder import making_cache
from data_scripts.latent_work import SplitWork, differences_of, foreign_shards
from pipelines.common.latents import downsampling_factor, latent_shape, posterior_moments
from pipelines.tools.cli import UserError, entry_point, keep_running_without_output, printable
from pipelines.tools.devices import get_device
from pipelines.tools.private import without_private
from pipelines.tools.progress import Progress
from training.core.draws import SampleKey
from training.core.files import write_json
from training.core.options import option
from training.core.parsing import parse_config
from training.data.aspect_buckets import BucketRule, sort_into_buckets
from training.data.checks import require_clean
from training.data.companions import SegmentationMask
from training.data.fingerprints import dataset_fingerprint, vae_fingerprint
from training.data.images import (
    DataConfig,
    ImageDataset,
    LabelMap,
    collate_items,
    load_all_splits,
    load_label_map,
    transform_fingerprint,
)
from training.data.latent_cache.check import open_images
from training.data.latent_cache.format import (
    FORMAT_VERSION,
    MANIFEST,
    complete_shard,
    read_manifest,
    remove_strays,
    shard_name,
    write_shard,
)
from training.data.source import folder_account, named_split, undecoded_images
from training.data.transforms import BadSample, BrokenImage, load_upright
from training.engine.launch import threads_per_process
from training.engine.loading import chosen_workers, usable_workers
from training.engine.ranks import RankWatch
from training.engine.signals import Interrupted, StopSignal, leave_signals_to_the_trainer
from training.models.vae_loading import load_vae
from training.objectives.segmentation import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset

_BYTES = {"float32": 4, "float16": 2}
_FREE_SPACE_MARGIN = 1.05
_ROWS_PER_CLASS = 2
UNET_DOWNSAMPLING = 2


@dataclass
class PrecomputeConfig(DataConfig):
    """Flags of this script."""

    vae: str = ""
    """VAE that encodes the images (required): Hub id, VAE or pipeline folder, or autoencoder run folder"""
    output_dir: str = ""
    """Folder to write the cache to (required)"""
    splits: list[str] = field(default_factory=lambda: ["train", "validation"])
    """Splits to encode"""
    seed: int = 0
    """Random seed that selects the held-out rows (without a validation split) and those of --max_train_samples"""
    labels: Literal["auto", "yes", "no"] = "auto"
    """Whether to cache --label_column; auto caches it if it exists and has at least two rows per class"""
    masks: Literal["auto", "yes", "no"] = "auto"
    """Whether to cache --mask_column at the images' resolution; auto caches it if it exists and holds class ids, not
    colours"""
    encode_batch_size: int = option(16, at_least=1)
    """Number of images encoded at once"""
    shard_rows: int = option(512, at_least=1)
    """Number of images per shard; an interruption loses at most the shard in progress"""
    storage_dtype: Literal["float32", "float16"] = "float32"
    """Data type of the stored latents: float32 gives the same latents as encoding during training; float16 halves
    the size and rounds to 3 digits"""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the VAE; a VAE that overflows in half precision (force_upcast) runs in float32 anyway"""
    dataloader_num_workers: int | Literal["auto"] = option("auto", at_least=0)
    """Number of processes that decode images. auto: up to 4 with a GPU and spare cores, otherwise 0"""
    device: str | None = None
    """Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"""
    cpu_threads: int = 0
    """Number of CPU threads; 0 divides the cores among the processes on this machine"""
    process_timeout: float = option(60.0, at_least=10)
    """With several processes: number of seconds after which a process that no longer responds ends the others"""
    num_jobs: int = option(1, at_least=1)
    """Number of independent jobs that make this cache together, each started with its own --job_index, on any machines
    that see the same --output_dir"""
    job_index: int = option(0, at_least=0)
    """With --num_jobs: which of the jobs this is, from 0; in a job array of Slurm, $SLURM_ARRAY_TASK_ID"""
    bucket_divisor: int = option(0, at_least=0)
    """With --aspect_buckets true: number of pixels of which the sides are multiples; for a U-Net, the downsampling of
    the VAE times that of the U-Net. 0 uses that of a U-Net with two levels"""
    bucket_images: int = option(16, at_least=1)
    """With --aspect_buckets true: sizes with fewer training images join the nearest one; a usual value is the global
    batch size of the training"""
    overwrite: bool = False
    """Replace a cache that was made with other data or settings"""

    def validate(self, prefix: str = "") -> None:
        """Raise UserError if a value is missing or invalid, or crops are random; nothing is opened."""
        super().validate(prefix)
        for name in ("vae", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; see --help")
        if not self.splits:
            raise UserError("no splits are given; name at least one, as in --splits '[train, validation]'")
        if self.job_index >= self.num_jobs:
            raise UserError(
                f"--job_index {self.job_index} is not one of --num_jobs {self.num_jobs} jobs; give a number from 0 to "
                f"{self.num_jobs - 1}"
            )
        if not self.center_crop or self.crop_scale < 1:
            random = f"crop_scale is {self.crop_scale:g}" if self.center_crop else "center_crop is false"
            raise UserError(
                f"{random}, but each image is encoded only once, so its random crop would never change; "
                "cache with --center_crop true and --crop_scale 1, or train without a cache"
            )


class Encoder:
    """The VAE on its device, and the shards that this process encodes."""

    def __init__(self, config: PrecomputeConfig, vae: nn.Module, device: torch.device):
        self.config = config
        # Environment variables instead of Accelerate's state: a process group would only add waiting and timeouts.
        self.rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        # The processes of all jobs divide the shards.
        self.place, self.places = config.job_index * processes + self.rank, config.num_jobs * processes
        self.device = device
        self.vae = vae.to(device)
        self.dtype = getattr(torch, config.storage_dtype)

    def tell(self, sentence: str) -> None:
        """Print from the main process only."""
        if self.rank == 0:
            print(sentence, flush=True)

    def file(self, split: str, number: int) -> Path:
        return Path(self.config.output_dir) / split / shard_name(number)

    def missing(self, work: SplitWork) -> list[int]:
        """Return the shards of this process that are missing or incomplete; existing shards are read to verify them."""
        mine = range(self.place, len(work.shards(self.config.shard_rows)), self.places)
        return [n for n in mine if complete_shard(self.file(work.name, n), work.request, verify=True) is None]

    def make(self, work: SplitWork, numbers: Sequence[int], progress: Progress) -> None:
        """Encode and write shards `numbers`."""
        shards = work.shards(self.config.shard_rows)
        batches = self._batches(work, [shards[number] for number in numbers])
        for number in numbers:
            columns: dict[str, list] = {}
            while sum(map(len, columns.get("index", []))) < len(shards[number]):
                batch = next(batches)
                for name, value in self._encode(batch).items():
                    columns.setdefault(name, []).append(value)
                progress.update(len(batch["index"]))
            captions = [caption for part in columns.pop("caption", []) for caption in part]
            tensors = {name: torch.cat(parts) for name, parts in columns.items()}
            tensors["row"] = tensors.pop("index")
            if "mask" in tensors:
                tensors["mask"] = tensors["mask"].to(torch.uint8)
            write_shard(self.file(work.name, number), tensors, captions if work.images.captions else None, work.request)

    def _batches(self, work: SplitWork, shards: Iterable[Sequence[int]]) -> Iterator[dict[str, Any]]:
        """Return batches that do not cross shards: a shard's bytes must not depend on which process encodes it."""
        size = self.config.encode_batch_size
        keys = []
        for rows in shards:
            keys += [[SampleKey(i, 0) for i in rows[start : start + size]] for start in range(0, len(rows), size)]
        workers = chosen_workers(self.config.dataloader_num_workers, work.images, self.device)
        loader = torch.utils.data.DataLoader(
            work.images,
            batch_sampler=keys,  # type: ignore[arg-type]
            collate_fn=collate_items,
            num_workers=usable_workers(workers, lambda: size * self._image_bytes()),
            worker_init_fn=leave_signals_to_the_trainer,
        )
        return iter(loader)

    def _image_bytes(self) -> int:
        return self.config.resolution**2 * (3 * 4 + 8)  # three channels of float32, and a mask of int64

    @torch.no_grad()
    def _encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Replace the images (B 3 H W) by `mean` and `logvar` (B V C h w)."""
        images = batch.pop("pixel_values").to(self.device)
        variants = [images, images.flip(-1)] if self.config.random_flip else [images]
        with self._autocast():
            moments = [posterior_moments(self.vae, variant) for variant in variants]
        for name, parts in zip(("mean", "logvar"), zip(*moments, strict=True), strict=True):
            if parts[0] is not None:
                batch[name] = torch.stack(parts, dim=1).to(self.dtype).cpu().contiguous()
                if not torch.isfinite(batch[name]).all():
                    raise UserError(
                        f"the VAE returned latents that are not finite in rows {batch['index'].tolist()} with "
                        f"mixed_precision {self.config.mixed_precision}, storage_dtype {self.config.storage_dtype}; "
                        "use --mixed_precision no --storage_dtype float32"
                    )
        return batch

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.config.mixed_precision == "no":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.config.mixed_precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)


def main(argv: Sequence[str] | None = None) -> int | None:
    config = parse_config(PrecomputeConfig, argv, description=__doc__)
    keep_running_without_output()
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with StopSignal() as stop, making_cache(Path(config.output_dir), config.job_index, config.num_jobs):
        try:
            with RankWatch(rank, processes, stop, patience=config.process_timeout) as watch, stop.at_once():
                precompute(config)
                watch.wait_for_all()
        except Interrupted:
            if rank == 0:
                print("\nStopped; run the same command again to resume after the last complete shard.", flush=True)
            return stop.exit_status(stop.requested or signal.SIGTERM)
    return 0


def precompute(config: PrecomputeConfig) -> None:
    """Encode the missing shards of the cache that are the share of this process."""
    torch.set_num_threads(config.cpu_threads or threads_per_process())
    device = get_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    vae = load_vae(config.vae, config.image_mode)
    shape = _latent_shape(vae, config)
    facts, works = _plan(config, vae, shape)
    _make_room(config, facts, works)
    encoder = Encoder(config, vae, device)
    todo = {work.name: encoder.missing(work) for work in works}
    if any(todo.values()):
        if (account := folder_account(config)) is not None:
            encoder.tell(printable(account.line()))
        for work in works:
            require_clean(work.images, shard=(encoder.place, encoder.places), tell=encoder.tell)
        shards = {work.name: work.shards(config.shard_rows) for work in works}
        images = sum(len(shards[name][n]) for name, numbers in todo.items() for n in numbers)
        _check_disk(config, images, facts)
        share = f", process {encoder.place + 1} of {encoder.places}" if encoder.places > 1 else ""
        size = f"{config.resolution} px to latents of {_times(shape)}"
        encoder.tell(f"Encoding {images:,} images of {size} on {encoder.device}{share}.")
        with Progress(images, "image", "latents", shown=encoder.rank == 0) as progress:
            for work in works:
                encoder.make(work, todo[work.name], progress)
    if not _finish(config, facts, works):
        if config.num_jobs > 1:
            encoder.tell(
                f"The share of job {config.job_index} is complete; the last job to finish completes the cache."
            )
        return  # other processes are still encoding; the last one to finish writes the manifest
    if not any(todo.values()) and encoder.places == 1:
        print(f"{config.output_dir} is already complete; there is nothing to do.")
    rows = ", ".join(f"{work.name} {len(work.images):,}" for work in works)
    print(f"Latents are in {config.output_dir} ({rows} images, {_times(shape)} each).")
    print(f"Train on them with: --latent_cache {config.output_dir} --vae {config.vae}")


def _plan(
    config: PrecomputeConfig, vae: nn.Module, shape: tuple[int, int, int]
) -> tuple[dict[str, Any], list[SplitWork]]:
    """Return the manifest's entries for the whole cache, and the splits to encode."""
    stored = named_split(config, load_all_splits(config), config.train_split)
    columns = stored.column_names
    captions = bool(config.caption_column) and (
        config.caption_column in columns or config.caption_column != DataConfig().caption_column
    )
    label_map, masks = _labels(config, stored), _masks(config, stored)
    images = {
        name: open_images(config, name, config.seed, captions=captions, label_map=label_map, masks=masks)
        for name in config.splits
    }
    buckets = _buckets(config, images.values(), vae) if config.aspect_buckets else None
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "vae": {"name": config.vae, "fingerprint": vae_fingerprint(vae)},
        "transform": transform_fingerprint(config),
        "resolution": config.resolution,
        "latent_shape": list(latent_shape(vae, *buckets["sizes"][0]) if buckets else shape),
        "storage_dtype": config.storage_dtype,
        "mixed_precision": config.mixed_precision,
        "flips": config.random_flip,
        "shard_rows": config.shard_rows,
        "seed": config.seed,
        "captions": captions,
        "label_names": label_map.names if label_map else [],
        # Recorded only if they differ from the defaults, so that caches made before these entries existed stay valid.
        **({"aspect_buckets": buckets} if buckets else {}),
        **({"mask_column": config.mask_column} if masks else {}),
        **({"label_column": config.label_column} if label_map and config.label_column != "label" else {}),
    }
    # The VAE is identified only by its fingerprint: renaming or moving its folder changes nothing in a shard.
    decisive = {**facts, "vae": facts["vae"]["fingerprint"], "on_bad_sample": config.on_bad_sample}
    works = []
    for name, dataset in images.items():
        if len(dataset):
            fingerprint = dataset_fingerprint(dataset)
            request = hashlib.sha256(json.dumps([decisive, name, fingerprint]).encode()).hexdigest()
            works.append(SplitWork(name, dataset, fingerprint, request))
    return facts, works


def _buckets(config: PrecomputeConfig, images: Iterable[ImageDataset], vae: nn.Module) -> dict[str, Any]:
    """Sort the images into aspect buckets, and return the manifest's entry about them."""
    divisor = config.bucket_divisor or UNET_DOWNSAMPLING * downsampling_factor(vae)
    buckets = sort_into_buckets(list(images), BucketRule(config.resolution, divisor, config.bucket_images))
    return {"sizes": [list(size) for size in buckets.sizes], "divisor": divisor, "images": config.bucket_images}


def _labels(config: PrecomputeConfig, stored: Dataset) -> LabelMap | None:
    """Return the classes to cache, or None (see `PrecomputeConfig.labels`)."""
    if config.labels == "no" or (config.labels == "auto" and config.label_column not in stored.column_names):
        return None
    label_map = load_label_map(config)
    # If nearly every row has a value of its own, the column identifies rows, not classes.
    return label_map if config.labels == "yes" or len(label_map) * _ROWS_PER_CLASS <= len(stored) else None


def _masks(config: PrecomputeConfig, stored: Dataset) -> bool:
    """Return whether to cache masks (see `PrecomputeConfig.masks`)."""
    if config.masks != "auto" or config.mask_column not in stored.column_names:
        return config.masks == "yes"
    try:
        masks = stored.select_columns([config.mask_column])
        first = undecoded_images(masks, config.mask_column, "mask_column", config)[0]
        SegmentationMask(config.mask_column, IGNORE_INDEX).load(first, load_upright(first[config.mask_column]).size)
    except (UserError, BadSample, BrokenImage):
        return False
    return True


def _make_room(config: PrecomputeConfig, facts: dict[str, Any], works: Sequence[SplitWork]) -> None:
    """Refuse to overwrite latents made with other data or settings, unless --overwrite is given.

    With --overwrite, the old manifest is deleted first, so that no manifest describes a mixture of old and new shards.

    Raises:
        UserError: the folder cannot be written, or holds other latents; the message lists the differences.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    differences = differences_of(manifest, facts, works) if manifest else foreign_shards(folder, works)
    if not differences:
        return
    if not config.overwrite:
        raise UserError(
            f"{folder} holds latents made with other data or settings: {'; '.join(differences)}; "
            "choose another --output_dir, or replace them with --overwrite true"
        )
    (folder / MANIFEST).unlink(missing_ok=True)


def _check_disk(config: PrecomputeConfig, images: int, facts: dict[str, Any]) -> None:
    channels, height, width = facts["latent_shape"]
    # Mean and log-variance, also for mirrored images if they are flipped.
    numbers = channels * height * width * 2 * (2 if config.random_flip else 1)
    bytes_each = numbers * _BYTES[config.storage_dtype] + (config.resolution**2 if "mask_column" in facts else 0)
    needed = images * bytes_each * _FREE_SPACE_MARGIN
    free = shutil.disk_usage(config.output_dir).free
    if needed > free:
        raise UserError(
            f"{needed / 1e9:.1f} GB are needed in {config.output_dir} and {free / 1e9:.1f} GB are free; "
            "choose another --output_dir, or halve the size with --storage_dtype float16"
        )


def _finish(config: PrecomputeConfig, facts: dict[str, Any], works: Sequence[SplitWork]) -> bool:
    """Write the manifest if the shards of all processes are complete; this holds for the last process to finish."""
    folder = Path(config.output_dir)
    splits: dict[str, dict[str, Any]] = {}
    for work in works:
        notes = []
        for number in range(len(work.shards(config.shard_rows))):
            note = complete_shard(folder / work.name / shard_name(number), work.request, verify=False)
            if note is None:
                return False
            notes.append(note)
        rows = len(work.images)
        splits[work.name] = {"rows": rows, "dataset": work.fingerprint, "request": work.request, "shards": notes}
        if config.aspect_buckets:
            splits[work.name]["buckets"] = [work.images.place_of_size(row) for row in range(rows)]
    before = (read_manifest(folder) or {"splits": {}})["splits"]
    write_json(folder / MANIFEST, without_private({**facts, "splits": {**before, **splits}}))
    for work in works:
        remove_strays(folder / work.name, {note["file"] for note in splits[work.name]["shards"]})
    return True


def _latent_shape(vae: nn.Module, config: PrecomputeConfig) -> tuple[int, int, int]:
    try:
        return latent_shape(vae, config.resolution, config.resolution)
    except ValueError as error:
        raise UserError(
            f"resolution {config.resolution} does not fit {config.vae}: {error}; change --resolution"
        ) from error


def _times(shape: Iterable[Any]) -> str:
    return "×".join(str(side) for side in shape)


if __name__ == "__main__":
    entry_point(main)
