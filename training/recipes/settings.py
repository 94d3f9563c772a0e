"""The settings for a collection of images and a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.recipes.collection import Collection

AUTOENCODER, DIFFUSION, CONTROLNET, JOINT = "autoencoder", "latent_diffusion", "controlnet", "image_caption"
MIN_STEPS = 4_000
TEXT_LENGTHS = (16, 24, 32, 48, 64, 77)
# The sides of the latents, in cells, that the autoencoder leaves; it gets one more level for each doubling.
LEAST_CELLS, MOST_CELLS = 4, 16
PATCH_SIZE = 4
# An autoencoder that sees its images more often than this memorizes them, unless crops and flips vary them.
FEW_EPOCHS = 10
# Up to this number of images, a model may return them instead of making new ones, so copies are searched for.
MOST_SEARCHED = 5_000
LATENT_CHANNELS = 16
# Largest number of patches along a side of the images, or latents, that a transformer denoises.
MOST_PATCHES = 10
# Convolutions after the transformer: after ten minutes on emoji, two or three are better than one or none (docs/LOG.md)
CONV_LAYERS = 3
# Where a transformer on pixels denoises by default (docs/recipes.md): it needs no autoencoder, so that all of a short
# time is its own, and on processors its matrix products are fast. Large images and GPUs have the U-Net.
TRANSFORMER_PIXELS, TRANSFORMER_SECONDS = 64, 2 * 3600
# Steps are planned for this many times the steps that fit by the probe, because --max_train_minutes, which times real
# steps, can only shorten a run.
OPTIMISM = 1.3
# A model that has seen its images this often gains nothing from more time; it only repeats them more exactly.
MOST_EPOCHS = 2_000
# In four minutes, batches of 16 gave better images than batches of 32 (docs/recipes.md). A narrower U-Net did not.
SHORT_BATCH = 16
# The EMA weights average over at most this share of a run that has a time budget.
EMA_SHARE = 0.1


@dataclass(frozen=True)
class Time:
    """The time that a training may take, and how fast its images are.

    Attributes:
        image_seconds: seconds of a step, divided by the images of its batch; 0 if nothing was measured, because
            several processes would measure different numbers, and only --max_train_minutes limits the run.
    """

    seconds: float
    image_seconds: float = 0.0

    def steps(self, batch: int, most: int) -> int:
        """Return the number of steps to plan, at most `most`."""
        if not self.image_seconds:
            return most
        return min(most, int(OPTIMISM * self.seconds / (self.image_seconds * batch)))


def denoiser_for(resolution: int, device: str, seconds: float | None) -> tuple[str, str]:
    """Return the network that denoises, "transformer" (on pixels) or "unet" (on latents), and the reason in words.

    Args:
        seconds: the time budget of the command; None without one, when a short run is assumed.
    """
    if device == "cuda":
        return "unet", f"the device is {device}"
    if resolution > TRANSFORMER_PIXELS:
        return "unet", f"images of more than {TRANSFORMER_PIXELS} pixels"
    if (seconds or 0) > TRANSFORMER_SECONDS:
        return "unet", f"more than {TRANSFORMER_SECONDS / 3600:g} hours"
    return "transformer", "small images and a short time: it needs no autoencoder"


def settings_for(
    stage: str,
    collection: Collection,
    *,
    device: str,
    resolution: int,
    cells: int = 0,
    widths: Sequence[int] = (),
    rectangles: bool = False,
    transformer: bool = False,
    fast_bf16: bool = False,
    num_processes: int = 1,
    time: Time | None = None,
) -> dict[str, Any]:
    """Return the value of each option that a collection and a device decide, by the name of the option.

    Args:
        device: "cpu", "mps" or "cuda".
        resolution: side of the images in pixels.
        cells: side of the latents, or of the images for a model of pixels; for latent diffusion.
        widths: channels of the levels of the network, if they are given.
        rectangles: whether some images are not square (`--aspect_buckets`), with shorter sides down to half of `cells`.
        transformer: whether the diffusion model is a transformer.
        fast_bf16: whether the CPU multiplies matrices faster in bfloat16.
        num_processes: number of processes that divide a batch among themselves.
        time: the time that the training may take; None for its usual number of steps.
    """
    large = device == "cuda"
    batch = {AUTOENCODER: 16, DIFFUSION: 16 if transformer else 32, CONTROLNET: 16, JOINT: 64}[stage]
    batch *= 2 if large else 1
    batch = _batch_size(batch, collection.images, num_processes)
    steps = _steps(stage, collection.images, batch * num_processes, large=large, transformer=transformer)
    if time is not None:
        batch, steps = _fitted(time, collection.images, batch, num_processes)
    found: dict[str, Any] = {
        "train_batch_size": batch,
        "max_train_steps": steps,
        "adam_beta2": 0.99,
        "checkpoints_total_limit": 1,
    }
    if stage == AUTOENCODER:
        found |= _autoencoder(resolution)
        if found["max_train_steps"] * batch * num_processes > FEW_EPOCHS * collection.images:
            found |= {"crop_scale": 0.5, "random_flip": True}
    elif stage == DIFFUSION:
        found |= _diffusion(collection)
        found |= _transformer(cells) if transformer else _unet(cells // 2 if rectangles else cells, widths, large=large)
        if transformer and fast_bf16 and device == "cpu":
            found["mixed_precision"] = "bf16"
        if collection.images <= MOST_SEARCHED:
            epochs = found["max_train_steps"] // max(1, collection.images // (batch * num_processes))
            found["memorization_epochs"] = epochs // 2 + 1  # once in the middle; the run also ends with a search
        if time is not None:
            found["ema_decay"] = min(found["ema_decay"], round(1 - 1 / (EMA_SHARE * steps), 4))
    elif stage == CONTROLNET:
        found |= {"learning_rate": 1e-3, "lr_scheduler": "linear", "cfg_dropout": 0.5, "ema_decay": 0.99}
    else:
        found |= _joint(collection, resolution)
    return found


def autoencoder_levels(resolution: int) -> int:
    """Return the number of levels of the autoencoder: two, or as many as latents of 4 to 16 cells per side need."""
    levels = 2
    while resolution / (PATCH_SIZE * 2 ** (levels - 1)) > MOST_CELLS and levels < 5:
        levels += 1
    return levels if resolution >= 2 * PATCH_SIZE * LEAST_CELLS else 1


def latent_cells(resolution: int) -> int:
    """Return the side of the latents of the autoencoder that `settings_for` describes, in cells."""
    return resolution // (PATCH_SIZE * 2 ** (autoencoder_levels(resolution) - 1))


def _batch_size(usual: int, images: int, num_processes: int) -> int:
    """Return a batch size at which all processes together do not need more images than there are."""
    return max(1, min(usual, images // num_processes))


def _steps(stage: str, images: int, batch: int, *, large: bool, transformer: bool) -> int:
    """Return the number of steps: enough epochs for a small collection, and an end for a large one."""
    if stage in (AUTOENCODER, CONTROLNET):
        return MIN_STEPS * (2 if large else 1)
    most = 60_000 if large else 20_000
    least = MIN_STEPS * (2 if transformer else 1)  # a transformer has smaller and faster steps
    return int(min(max(least, 100 * images / batch), most)) // 100 * 100


def useful_steps(images: int, batch: int) -> int:
    """Return the number of steps after which more time is not useful."""
    return max(MIN_STEPS, MOST_EPOCHS * images // batch)


def _fitted(time: Time, images: int, batch: int, num_processes: int) -> tuple[int, int]:
    """Return (batch size, steps) for a time: smaller batches where few steps fit, in hundreds of steps."""
    while batch > SHORT_BATCH and time.steps(batch, MIN_STEPS) < MIN_STEPS:
        batch = max(SHORT_BATCH, batch // 2)
    steps = time.steps(batch, useful_steps(images, batch * num_processes))
    return batch, max(100, steps // 100 * 100)


def _autoencoder(resolution: int) -> dict[str, Any]:
    return {
        "model.block_out_channels": [96, *[128] * (autoencoder_levels(resolution) - 1)],
        "model.patch_size": PATCH_SIZE,
        "model.latent_channels": LATENT_CHANNELS,
        "learning_rate": 1e-3,
        "lr_scheduler": "linear",
        "weight_decay": 0.0,
        "l1_weight": 1.0,
        "l2_weight": 1.0,
        "kl_weight": 1e-5,
        "ema_decay": 0.998,
        "ema_update_every": 2,
    }


def _diffusion(collection: Collection) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prediction_type": "flow_prediction",
        "timestep_sampling": "logit_normal",
        "cfg_dropout": 0.1,
        "lr_scheduler": "cosine",
        "ema_update_every": 4,
    }
    if collection.caption_words:
        found["text_encoder.max_length"] = _text_length(collection.caption_words)
    return found


def _transformer(cells: int) -> dict[str, Any]:
    """Return the settings of a transformer; the mean and the learning rate are from prototypes (docs/LOG.md).

    The mean of the logit-normal distribution favours noisy images: with most of the noise gone, large patches differ
    little from their input.
    """
    size = patch_size(cells)
    return {
        "transformer.patch_size": size,
        "transformer.conv_layers": 0 if size % 2 else CONV_LAYERS,
        "logit_mean": 0.8,
        "learning_rate": 1e-3,
        "ema_decay": 0.998,
    }


def patch_size(cells: int) -> int:
    """Return the side of a patch: the least divisor of `cells` that leaves at most MOST_PATCHES patches per side."""
    return next(size for size in range(1, cells + 1) if cells % size == 0 and cells // size <= MOST_PATCHES)


def _unet(cells: int, widths: Sequence[int], *, large: bool) -> dict[str, Any]:
    if not widths:
        # The smallest feature map must have 4 × 4 cells.
        narrow, wide = [128, 192], [128, 192, 256]
        widths = [192] if cells < 8 else narrow if cells <= 8 else wide if cells <= 16 else [*wide, 320]
        widths = [2 * width for width in widths] if large else widths
    # Attention on the two lowest resolutions, which have at most 16 × 16 cells.
    attention = [level for level in range(len(widths)) if level >= len(widths) - 2]
    return {
        "model.block_out_channels": list(widths),
        "model.attention_levels": attention,
        "learning_rate": 5e-4,
        "ema_decay": 0.999,
    }


def _joint(collection: Collection, resolution: int) -> dict[str, Any]:
    return {
        "model.latent_size": 256,
        "model.max_length": _text_length(collection.caption_words),
        "model.patch_size": max(1, min(8, resolution // 8)) if resolution <= 64 else 4,
        "model.block_out_channels": [96, 192] if resolution <= 64 else [96, 192, 288, 384],
        "model.map_channels": 64,
        "model.text_hidden_size": 192,
        "model.num_attention_heads": 4,
        "model.num_encoder_layers": 2,
        "model.num_decoder_layers": 3,
        "model.prefix_length": 4,
        "prior.hidden_size": 384,
        "prior.num_layers": 3,
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "ema_decay": 0.995,
        "ema_update_every": 4,
    }


def _text_length(words: int) -> int:
    """Return a maximum number of tokens for captions of `words` words: many words have two pieces; two are added."""
    needed = 1.5 * words + 2
    return next((length for length in TEXT_LENGTHS if length >= needed), TEXT_LENGTHS[-1])


def kept(settings: Mapping[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Return the settings that the command line does not give.

    A length that is given in another way, such as --num_train_epochs, replaces the number of steps.
    """
    others = {"max_train_steps": {"num_train_epochs", "extra_epochs"}}
    return {
        name: value for name, value in settings.items() if name not in given and not others.get(name, set()) & {*given}
    }
