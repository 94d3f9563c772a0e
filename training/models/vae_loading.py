"""Load a VAE by name or path: a Diffusers VAE folder or Hub id, a pipeline, or a run of train_autoencoder.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from pipelines.tools.checkpoint_links import follow_links_or_name
from pipelines.tools.cli import UserError, cause, located
from pipelines.tools.commands import command
from pipelines.tools.weights import weights_variant
from training.data.transforms import CHANNELS

# Where the VAE may be in a folder or repository: in the folder itself, in a pipeline, or in a training run.
_SUBFOLDERS = (None, "vae", "pipeline/vae")
PIXELS = "pixels"
# Autoencoder classes of Halftone, by the module that defines them.
_OWN_CLASSES = {"MultiHeadAutoencoderKL": "multi_head_autoencoder", "PixelAutoencoder": "pixel_autoencoder"}


def load_vae(name_or_path: str, image_mode: str = "rgb") -> torch.nn.Module:
    """Load a VAE for a diffusion pipeline: in float32, in eval mode, frozen, and without heads.

    Args:
        name_or_path: a VAE folder or Hub id (any autoencoder class of Diffusers, or `MultiHeadAutoencoderKL`), a
            pipeline with a `vae`, or the run folder of an autoencoder; or "pixels", for the identity.
        image_mode: "rgb", "rgba" or "l", the images that it encodes.

    Raises:
        UserError: it does not exist, is not a VAE, or has damaged weights, or encodes other images than `image_mode`.
    """
    if name_or_path == PIXELS:
        from pipelines.models.pixel_autoencoder import PixelAutoencoder

        return PixelAutoencoder(latent_channels=CHANNELS[image_mode]).eval()
    name_or_path = follow_links_or_name(name_or_path)
    config, subfolder = _find_config(name_or_path)
    vae_class = _class_of(config, name_or_path)
    _check_channels(config, name_or_path, image_mode)
    folder = Path(name_or_path).expanduser()
    local = folder.is_dir()
    variant = weights_variant(folder / (subfolder or "")) if local else None
    try:
        vae = vae_class.from_pretrained(
            str(folder) if local else name_or_path,
            subfolder=subfolder,
            torch_dtype=torch.float32,
            variant=variant,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the VAE '{name_or_path}' cannot be loaded ({cause(error)}); check --vae") from error
    if hasattr(vae, "autoencoder"):
        vae = vae.autoencoder()
    return vae.eval().requires_grad_(False)


def _check_channels(config: dict[str, Any], name: str, image_mode: str) -> None:
    """Raise UserError if a VAE with this config encodes other images than `image_mode`."""
    pixels = "PixelAutoencoder" in (config.get("_class_name") or ())  # the name, or [module, name]
    channels = config.get("latent_channels" if pixels else "in_channels", 3)
    if channels != CHANNELS[image_mode]:
        modes = {number: mode for mode, number in CHANNELS.items()}
        raise UserError(
            f"the VAE '{name}' encodes images with {channels} channels ({modes.get(channels, 'of another kind')}), but "
            f"--image_mode {image_mode} has {CHANNELS[image_mode]}; train one with "
            f"`{command('training/train_autoencoder.py')} --image_mode {image_mode}`, or choose another --image_mode"
        )


def _find_config(name_or_path: str) -> tuple[dict[str, Any], str | None]:
    """Return (config.json, subfolder) of the VAE in a folder or Hub repository."""
    from diffusers import AutoencoderKL

    path = Path(name_or_path).expanduser()
    if path.is_dir():
        for subfolder in _SUBFOLDERS:
            if (path / (subfolder or "") / "config.json").is_file():
                return AutoencoderKL.load_config(str(path / (subfolder or ""))), subfolder
        raise UserError(
            f"found no VAE in {located(name_or_path)} (no config.json, no vae/, no pipeline/vae/); --vae takes the "
            "folder of a VAE, of a pipeline, or of a finished autoencoder run"
        )
    if path.is_absolute() or name_or_path.startswith((".", "~")) or len(path.parts) != 2 or path.parent.is_dir():
        raise UserError(f"the VAE {located(name_or_path)} does not exist; check --vae")
    reason = ""
    for subfolder in _SUBFOLDERS[:2]:
        try:
            return AutoencoderKL.load_config(name_or_path, subfolder=subfolder), subfolder
        except (OSError, ValueError) as error:
            reason = reason or cause(error)
            if type(error.__context__).__name__ == "LocalEntryNotFoundError":  # no network: do not wait for it twice
                break
    raise UserError(
        f"the VAE '{name_or_path}' is not a local folder and cannot be downloaded from the Hub ({reason}); check --vae"
    )


def _class_of(config: dict[str, Any], name_or_path: str) -> Any:
    import diffusers

    name = config.get("_class_name")
    # A custom class that was saved for loading by remote code is named [module, class].
    name = name[-1] if isinstance(name, list | tuple) else name
    if name in _OWN_CLASSES:
        return getattr(importlib.import_module(f"pipelines.models.{_OWN_CLASSES[name]}"), name)
    vae_class = getattr(diffusers, name, None) if name else None
    if vae_class is None or not (hasattr(vae_class, "encode") and hasattr(vae_class, "decode")):
        raise UserError(
            f"'{name_or_path}' holds a {name or 'model without a class name'}, which is not an autoencoder class of "
            "Diffusers; --vae takes an AutoencoderKL, AutoencoderTiny or similar"
        )
    return vae_class
