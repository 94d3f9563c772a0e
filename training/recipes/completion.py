"""Completes the config of a training command for a collection of images: what is not given is decided here.

A training script passes one of these functions to `parse_config`, which calls it if the command names a source of
images and no YAML file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError
from pipelines.tools.commands import command
from pipelines.tools.devices import get_device
from pipelines.tools.private import expand_home
from training.core.files import read_json_object
from training.core.made_folders import incomplete
from training.data.aspect_buckets import BucketRule
from training.models.autoencoder import AutoencoderModelConfig
from training.models.denoiser import divisor_of_sides
from training.models.vae_loading import PIXELS
from training.recipes import estimate, settings
from training.recipes.one_command import DATA, SHARED, Completion, set_option
from training.recipes.options import budget_seconds
from training.run.folder import RunFolder

_DATA_OF_CONTROLS = (
    *("dataset_name", "dataset_config_name", "dataset_revision", "train_data_dir"),
    *("image_column", "on_bad_sample"),
)
CONTROL_KIND = "soft_edges"
# Options that only fit a U-Net on latents; one of them keeps it.
_OF_UNET = ("vae", "latent_cache")
_GROUPS_OF_UNET = ("model.", "caption_prior.")
# The part of --max_train_minutes that the training of an input gets: the autoencoder, as in the quickstart, and the
# base model of a ControlNet.
AUTOENCODER_SHARE, BASE_MODEL_SHARE = 1 / 3, 2 / 3

Complete = Callable[[Any, frozenset[str]], None]


def for_own_images(complete: Complete) -> Complete:
    """Call `complete` only if the command names a source of images and does not turn the choice of settings off."""

    @functools.wraps(complete)
    def complete_if_wanted(config: Any, given: frozenset[str]) -> None:
        if config.source and config.recipe == "auto":
            config.chosen = True
            complete(config, given)

    return complete_if_wanted


@for_own_images
def complete_autoencoder(config: Any, given: frozenset[str]) -> None:
    """Complete the config of train_autoencoder.py for the images that it names."""
    run = Completion(config, given, settings.AUTOENCODER)
    run.decide_output_dir(str(run.folder / f"autoencoder_{config.resolution}"))
    # Another kind of autoencoder is built in another way: what is not given then keeps its default.
    own_network = given & {"model.class_name", "model.patch_size"}
    run.own_settings(leave_out="model." if own_network else "")
    images, batch = run.collection.images, config.train_batch_size
    run.trainings.append(estimate.autoencoder("autoencoder", config.model, config.resolution, run.steps, batch, images))
    run.finish()


@for_own_images
def complete_latent_diffusion(config: Any, given: frozenset[str]) -> None:
    """Complete the config of train_latent_diffusion.py for the images that it names."""
    run = Completion(config, given, settings.DIFFUSION)
    run.decide("condition_on", _conditions(run))
    for name in ("vae", "tokenizer"):  # the weights were trained with them
        if run.origin.get(name) and name not in given:
            setattr(config, name, expand_home(run.origin[name]))
    name = f"latent_diffusion_{config.resolution}{_suffix(run)}_{_kind(config.condition_on)}"
    name = f"{name}_{'lora' if config.lora_rank else 'finetuned'}" if config.init_from else name
    config.denoiser = _denoiser(run, name)
    run.decide_output_dir(str(run.folder / _free_name(run, name, config.denoiser)))
    suffix = _suffix(run)
    if not config.vae and config.denoiser == "transformer":
        config.vae = PIXELS
    run.decide("condition_on", run.saved.get("condition_on", config.condition_on))
    if config.with_captions and not (config.tokenizer or config.pretrained_text_encoder):
        config.tokenizer = str(_tokenizer(run))
    if not config.vae:
        config.vae = str(_autoencoder(run))
    began_without_cache = not run.saved.get("latent_cache", "unknown")
    # A cache would keep one crop of each image, and one choice of aspect buckets.
    varies = not config.center_crop or config.crop_scale < 1 or config.aspect_buckets
    if config.vae != PIXELS and not config.latent_cache and not varies and not began_without_cache:
        config.latent_cache = str(_latents(run, suffix))
    cells, channels = _latent_shape(run)
    widths = config.model.block_out_channels if "model.block_out_channels" in given else ()
    classes = len(run.collection.classes) if config.with_labels else 0

    def training() -> estimate.Training:
        images, shape = run.collection.images, (channels, cells)
        return estimate.diffusion("latent diffusion", config, run.steps, shape, classes, images)

    situation = {"cells": cells, "widths": widths, "rectangles": config.aspect_buckets}
    run.own_settings(training=training, transformer=config.denoiser == "transformer", **situation)
    if config.aspect_buckets:  # known before the autoencoder is trained
        divisor, least_cells = divisor_of_sides(config)
        BucketRule(
            config.resolution, config.resolution // cells * divisor, least_cells=least_cells
        ).require_rectangles()
    run.finish()


@for_own_images
def complete_controlnet(config: Any, given: frozenset[str]) -> None:
    """Complete the config of train_controlnet.py for the images that it names."""
    run = Completion(config, given, settings.CONTROLNET)
    run.decide_output_dir(str(run.folder / f"controlnet_{config.resolution}_{config.fusion_mode}"))
    run.own_settings()
    path = None
    if not run.collection.control_images and "conditioning_image_column" not in given:
        path = run.folder / f"controls_{config.resolution}_{CONTROL_KIND}"
        run.needs(
            path,
            "data_scripts/make_controls.py",
            {"kind": CONTROL_KIND, "resolution": config.resolution, "output_dir": str(path)},
            pass_on=_DATA_OF_CONTROLS,
        )
        run.lines.append(f"control images are missing, so {CONTROL_KIND} are drawn from the images")
        run.decide("conditioning_image_mode", "l")
    if not config.base_model:  # last, since it takes longest
        config.base_model = str(_base_model(run))
    if path is not None:
        config.dataset_name, config.train_data_dir = str(path), None
    run.finish()


@for_own_images
def complete_image_caption(config: Any, given: frozenset[str]) -> None:
    """Complete the config of train_image_caption.py for the images that it names."""
    run = Completion(config, given, settings.JOINT)
    if not run.collection.caption_words:
        raise UserError(
            f"{config.source} has no captions, which this model learns together with the images; add them (see 'Where "
            f"can captions be' in docs/data.md), or train without captions: "
            f"{command('training/train_latent_diffusion.py')} --train_data_dir {config.source}"
        )
    run.decide_output_dir(str(run.folder / f"image_caption_{config.resolution}"))
    run.own_settings()
    run.finish()


def _denoiser(run: Completion, name: str) -> str:
    """Return the network that denoises: the given one, that of the run that is continued, or the chosen one.

    Args:
        name: name of the folder of the run, if it is not given.
    """
    config, given = run.config, run.given
    if "denoiser" in given:
        return config.denoiser
    if run.origin:  # the weights of another run
        run.why_denoiser = "that of --init_from"
        return run.origin.get("denoiser", "unet")
    of_unet = [one for one in sorted(given) if one in _OF_UNET or one.startswith(_GROUPS_OF_UNET)]
    if of_unet and (of_unet != ["vae"] or config.vae != PIXELS):
        run.why_denoiser = f"because of --{of_unet[0]}"
        return "unet"
    if begun := _begun(run, config.output_dir if "output_dir" in given else run.folder / name):
        run.why_denoiser = "that of the run that is continued"
        return begun
    seconds = budget_seconds(config.time_budget) or None
    chosen, run.why_denoiser = settings.denoiser_for(config.resolution, get_device().type, seconds)
    return chosen


def _begun(run: Completion, folder: Path | str) -> str:
    """Return the network of the run in a folder; an empty string if there is none."""
    saved = {} if run.config.overwrite else RunFolder(folder).saved_config() or {}
    return saved.get("denoiser", "unet") if saved else ""


def _free_name(run: Completion, name: str, denoiser: str) -> str:
    """Return the name of the folder of a run, with that of its network if another network was trained in the folder."""
    return name if _begun(run, run.folder / name) in ("", denoiser) else f"{name}_{denoiser}"


def _suffix(run: Completion) -> str:
    """Return what names of folders say of a VAE that is not that of the collection."""
    own_vae = str(run.folder / f"autoencoder_{run.config.resolution}")
    vae = run.config.vae
    return f"_{_short(vae)}" if vae not in ("", own_vae, PIXELS) else ""


def _conditions(run: Completion) -> list[str]:
    """Return what the images have: captions, classes, both or neither."""
    return [
        *(["caption"] if run.collection.caption_words else []),
        *(["label"] if run.collection.classes else []),
    ]


def _kind(conditions: Iterable[str]) -> str:
    return "_".join(sorted(conditions)) or "unconditional"


def _short(name: str) -> str:
    path = Path(name.rstrip("/"))
    return (path.parent if path.name == "pipeline" else path).name or "vae"


def _tokenizer(run: Completion) -> Path:
    path = run.folder / "tokenizer"
    return run.needs(path, "data_scripts/train_tokenizer.py", {"output_dir": str(path)})


def _autoencoder(run: Completion) -> Path:
    path = run.folder / f"autoencoder_{run.config.resolution}"
    missing = incomplete(path / "pipeline", "training/train_autoencoder.py") is not None
    minutes = run.minutes_for("autoencoder", AUTOENCODER_SHARE, made=not missing)
    flags = {"output_dir": str(path), **run.capped(settings.AUTOENCODER), **minutes}
    run.needs(path / "pipeline", "training/train_autoencoder.py", flags, pass_on=(*DATA, *SHARED))
    usual = run.settings(settings.AUTOENCODER)
    trained = (read_json_object(path / "record.json") or {}).get("steps", usual["max_train_steps"])
    if not missing and trained < usual["max_train_steps"]:
        run.lines.append(
            f"{path} was trained for {trained:,} steps only, and usually has {usual['max_train_steps']:,}: images will "
            f"be blurred; to train it again, rename or delete {run.folder}"
        )
    elif missing:
        chosen = {**usual, **flags}
        model = AutoencoderModelConfig()
        for name, value in chosen.items():
            if name.startswith("model."):
                set_option(model, name.removeprefix("model."), value)
        steps, batch = chosen["max_train_steps"], chosen["train_batch_size"]
        size, images = run.config.resolution, run.collection.images
        training = estimate.autoencoder("autoencoder", model, size, steps, batch, images)
        training.limit = 60 * minutes.get("max_train_minutes", 0.0)
        run.trainings.append(training)
    return path


def _latents(run: Completion, suffix: str) -> Path:
    path = run.folder / f"latents_{run.config.resolution}{suffix}"
    flags = {"output_dir": str(path), "vae": run.config.vae}
    if run.collection.classes:
        flags["labels"] = "yes"
    pass_on = (*DATA, "seed", "cpu_threads")
    run.needs(path / "cache.json", "data_scripts/precompute_latents.py", flags, pass_on=pass_on)
    return path


def _base_model(run: Completion) -> Path:
    name = f"latent_diffusion_{run.config.resolution}_{_kind(_conditions(run))}"
    path = run.folder / _free_name(run, name, "unet")
    cells = settings.latent_cells(run.config.resolution)
    made = incomplete(path / "pipeline", "training/train_latent_diffusion.py") is None
    minutes = run.minutes_for("base model", BASE_MODEL_SHARE, made=made)
    # A ControlNet steers a U-Net only.
    flags = {"output_dir": str(path), "denoiser": "unet", **run.capped(settings.DIFFUSION, cells=cells), **minutes}
    run.needs(path / "pipeline", "training/train_latent_diffusion.py", flags, pass_on=(*DATA, *SHARED))
    return path


def _latent_shape(run: Completion) -> tuple[int, int]:
    """Return (cells per side, channels) of the latents of the VAE, which may not have been made yet."""
    config = run.config
    if f"{config.vae}/pipeline" in run.prepare and incomplete(
        f"{config.vae}/pipeline", "training/train_autoencoder.py"
    ):
        return settings.latent_cells(config.resolution), settings.LATENT_CHANNELS
    from pipelines.common.latents import latent_shape
    from training.models.vae_loading import load_vae

    channels, height, _ = latent_shape(load_vae(config.vae, config.image_mode), config.resolution, config.resolution)
    return height, channels
