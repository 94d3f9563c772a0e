"""The table of what was chosen for a collection: each setting with its value and the reason in a few words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.tools.devices import get_device
from training.core.parsing import written
from training.models.vae_loading import PIXELS
from training.recipes import estimate, settings

if TYPE_CHECKING:
    from training.recipes.one_command import Completion

Row = tuple[str, str, str]
_HEADER: Row = ("setting", "value", "why")


def lines(rows: Sequence[Row]) -> list[str]:
    """Return the table as lines with aligned columns; they are also readable in a file."""
    widths = [max(len(row[column]) for row in (_HEADER, *rows)) for column in (0, 1)]
    return [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {why}".rstrip() for name, value, why in (_HEADER, *rows)]


def decisions(run: Completion) -> list[Row]:
    """Return the rows about a command whose settings have been chosen."""
    config = run.config
    rows = list(_network(run)) if run.stage == settings.DIFFUSION else []
    if run.stage == settings.AUTOENCODER:
        rows.append(_row(run, "channels", "model.block_out_channels", f"latents of up to {settings.MOST_CELLS} cells"))
    rows.append(_row(run, "batch size", "train_batch_size", _why_batch(run)))
    rows.append(_length(run))
    rows.append(_row(run, "learning rate", "learning_rate", "that of this network"))
    rows.append(_row(run, "EMA decay", "ema_decay", _why_ema(run)))
    if config.mixed_precision == "bf16":
        rows.append(_row(run, "precision", "mixed_precision", "this processor multiplies matrices faster in bfloat16"))
    rows.append(_augmentation(run))
    if config.max_train_minutes:
        seconds = 60 * config.max_train_minutes
        name = "time_budget" if config.time_budget else "max_train_minutes"
        flag = f"--{name} {written(getattr(config, name))}"
        if run.saved:
            rows.append(("time limit", flag, "the time that earlier sessions took counts"))
        else:
            rows.append(("end", f"until {estimate.finish(seconds)}", f"{flag}; it may be earlier"))
    return rows


def _row(run: Completion, title: str, name: str, why: str, value: str = "") -> Row:
    """Return the row about an option; one that is given, or that the run was begun with, has that as its reason."""
    from training.recipes.one_command import get_option

    found: Any = get_option(run.config, name)
    text = value or (f"{found:g}" if isinstance(found, float) else written(found))
    if name in run.given:
        return title, text, "given"
    return title, text, "as the run was begun" if run.saved else why


def _network(run: Completion) -> Iterator[Row]:
    """Yield the rows about the networks of latent diffusion."""
    config = run.config
    is_transformer, on_pixels = config.denoiser == "transformer", config.vae == PIXELS
    name = "transformer" if is_transformer else "U-Net"
    network = f"{name} on {'pixels' if on_pixels else 'latents'}"
    yield _row(run, "network", "denoiser", run.why_denoiser, network)
    if config.lora_rank:
        yield "adapter", f"LoRA of rank {config.lora_rank}", f"trained instead of the weights of {config.init_from}"
    if on_pixels:
        yield "autoencoder", "none", "given" if "vae" in run.given else "the network works on pixels"
    else:
        yield "autoencoder", config.vae, "given" if "vae" in run.given else "that of this collection"
    if is_transformer:
        cells, size = run.cells, config.transformer.patch_size
        patches = f"{cells // size} × {cells // size} patches of {size} × {size}"
        why = f"at most {settings.MOST_PATCHES} patches per side"
        yield _row(run, "patches", "transformer.patch_size", why, patches)
        shape = f"width {config.transformer.hidden_size}, {config.transformer.num_layers} layers"
        yield _row(run, "size", "transformer.hidden_size", "the usual one", shape)
        layers = config.transformer.conv_layers
        why = "they smooth the borders between patches" if layers else "patches of an odd side cannot have them"
        yield _row(
            run, "convolutions", "transformer.conv_layers", why, f"{layers} after the layers" if layers else "none"
        )
    else:
        yield "samples", f"{run.cells} × {run.cells}", "pixels" if on_pixels else "cells of the latents"
        why = f"fits {run.cells} × {run.cells} samples on the device {get_device().type}"
        yield _row(run, "channels", "model.block_out_channels", why)


def _why_batch(run: Completion) -> str:
    most = run.settings_without_time["train_batch_size"]
    if run.time is not None and run.config.train_batch_size < most:
        return f"few steps fit: with {most} images, fewer than {settings.MIN_STEPS:,}"
    if run.config.train_batch_size == run.collection.images:
        return "all images"
    return f"the usual one on the device {get_device().type}"


def _length(run: Completion) -> Row:
    """Return the row about the length of the run."""
    config, images = run.config, run.collection.images
    own = next((name for name in ("extra_epochs", "max_train_steps", "num_train_epochs") if name in run.given), "")
    batch = config.train_batch_size * config.gradient_accumulation_steps
    if own == "extra_epochs":
        return "steps", f"{config.extra_epochs} more epochs", "given"
    epochs = f"{run.steps * batch / max(1, images):,.0f} epochs"
    if own or run.saved:
        return "steps", f"{run.steps:,}", "given" if own else f"as the run was begun; {epochs}"
    if run.time is None:
        return "steps", f"{run.steps:,}", f"{epochs}, the usual number for {images:,} images"
    if run.steps >= settings.useful_steps(images, batch) // 100 * 100:
        return "steps", f"{run.steps:,}", f"{epochs}; more would only repeat the images"
    why = f"{epochs}; more than fit into {estimate.duration(run.time.seconds)}, and shortened once steps are timed"
    return "steps", f"at most {run.steps:,}", why


def _why_ema(run: Completion) -> str:
    if run.time is not None and run.config.ema_decay < run.settings_without_time["ema_decay"]:
        return "a short run: the EMA weights average over a tenth of it"
    return "that of this network"


def _augmentation(run: Completion) -> Row:
    config = run.config
    parts = ["crops"] if config.crop_scale < 1 else []
    parts += ["flips"] if config.random_flip else []
    if {"crop_scale", "random_flip"} & run.given:
        why = "given"
    elif parts:
        why = f"more than {settings.FEW_EPOCHS} epochs, which the autoencoder would memorize"
    else:
        why = "images are not mirrored or cropped unasked (--random_flip, --crop_scale)"
    return "augmentation", " and ".join(parts) or "none", why
