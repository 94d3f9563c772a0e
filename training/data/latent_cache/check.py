"""Check that a latent cache belongs to a run: that it was made with its VAE, its transform and its data."""

from __future__ import annotations

import logging
import shlex
from dataclasses import fields, replace

import torch

from pipelines.tools.cli import UserError
from training.data.fingerprints import dataset_fingerprint, vae_fingerprint
from training.data.images import DataConfig, ImageDataset, LabelMap, load_label_map, load_split, transform_fingerprint
from training.data.latent_cache.dataset import LatentCache
from training.data.latent_cache.format import MAKER
from training.data.transforms import WITHOUT_PROFILES
from training.objectives.segmentation import IGNORE_INDEX

logger = logging.getLogger(__name__)


def check_cache(cache: LatentCache, vae: torch.nn.Module, vae_name: str, config: DataConfig | None = None) -> None:
    """Check that a cache belongs to this VAE and, if `config` names a dataset, to this dataset.

    Raises:
        UserError: VAE, transform or dataset differ; the message has both values and the command for a new cache.
    """
    differences = _vae_differences(cache, vae, vae_name)
    if config is not None:
        differences += _transform_differences(cache, config)
        if config.dataset_name or config.train_data_dir:
            differences += _dataset_differences(cache, config)
    if differences:
        raise UserError(
            f"the latent cache '{cache.path}' does not belong to this run: {'; '.join(differences)}. "
            f"Make it again:\n  {_rebuild_command(cache, config or DataConfig(), vae_name)}"
        )


def open_images(
    config: DataConfig, split: str, seed: int, *, captions: bool, label_map: LabelMap | None, masks: bool = False
) -> ImageDataset:
    """Open the images of a split as a cache stores them: unflipped, with all captions, and masks of any class."""
    return ImageDataset(
        load_split(config, split, seed),
        config,
        captions=captions,
        labels=label_map is not None,
        label_map=label_map,
        num_mask_classes=IGNORE_INDEX if masks else 0,
        augment=False,
        every_caption=True,
    )


def _vae_differences(cache: LatentCache, vae: torch.nn.Module, vae_name: str) -> list[str]:
    there, here = cache.manifest["vae"]["fingerprint"], vae_fingerprint(vae)
    if here == there:
        return []
    return [f"VAE: the cache was made with {cache.vae_name} ({there[:12]}), this run uses {vae_name} ({here[:12]})"]


def _transform_differences(cache: LatentCache, config: DataConfig) -> list[str]:
    differences = []
    there, here = cache.manifest["transform"], transform_fingerprint(config)
    version, _, rest = there.partition(" ")
    if version in {f"v{number}" for number in WITHOUT_PROFILES} and rest == here.partition(" ")[2]:
        logger.warning(
            "the latent cache '%s' was made by an earlier version, which did not convert embedded colour profiles to "
            "sRGB; if images have one, a new cache has truer colours",
            cache.path,
        )
    elif here != there:
        differences.append(f"transform: the cache has '{there}', this run has '{here}'")
    if config.random_flip and not cache.has_flips:
        differences.append("transform: the cache has no mirrored images, this run uses --random_flip")
    return differences


def _dataset_differences(cache: LatentCache, config: DataConfig) -> list[str]:
    differences = []
    names = list(cache.id2label.values())
    label_map = load_label_map(config, names) if names else None
    # The fingerprint includes the cached masks, whether or not this run uses masks.
    config = replace(config, mask_column=cache.mask_column or config.mask_column)
    for name, split in cache.manifest["splits"].items():
        data = open_images(
            config,
            name,
            cache.manifest["seed"],
            captions=cache.has_captions,
            label_map=label_map,
            masks=cache.mask_column is not None,
        )
        fingerprint = dataset_fingerprint(data)
        if fingerprint != split["dataset"]:
            differences.append(
                f"dataset: split '{name}' of the cache is {split['dataset'][:12]} ({split['rows']} rows), "
                f"that of {config.dataset_name or config.train_data_dir} is {fingerprint[:12]} ({len(data)} rows)"
            )
    return differences


def _rebuild_command(cache: LatentCache, config: DataConfig, vae_name: str) -> str:
    """Return the command that makes this cache again for `config`, with the same seed and storage type."""
    words = [*shlex.split(MAKER), "--vae", vae_name, "--output_dir", str(cache.path), "--overwrite", "true"]
    given = {
        field.name: (getattr(config, field.name), getattr(DataConfig(), field.name)) for field in fields(DataConfig)
    }
    if config.aspect_buckets and "aspect_buckets" in cache.manifest:
        given |= {f"bucket_{name}": (cache.manifest["aspect_buckets"][name], None) for name in ("divisor", "images")}
    given["seed"] = (cache.manifest["seed"], 0)
    given["storage_dtype"] = (cache.manifest["storage_dtype"], "float32")
    for name, (value, default) in given.items():
        if value != default:
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)
