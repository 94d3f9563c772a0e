"""Conversion between a VAE's own units and the scaled latents of a diffusion model. Latents are scaled nowhere else.

Shapes: B batch, C latent channels, H W pixels, h w latent cells. `images`: B 3 H W in [-1, 1].
`z`: B C h w in the VAE's raw units. `latents`: B C h w in scaled units, what a U-Net is trained on.

All numbers come from the VAE's own config; a missing number has no effect (shift 0, scale 1):

    latents = (z - latents_mean) / latents_std * scaling_factor      where the config has mean or std (SDXL's rule)
    latents = (z - shift_factor) * scaling_factor                    otherwise (Stable Diffusion, Flux, AutoencoderTiny)

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def encode_latents(vae: nn.Module, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Encode images (B 3 H W, in [-1, 1]) to scaled latents (B C h w, float32).

    Args:
        noise: B C h w, standard normal, to draw from the posterior as `mean + exp(logvar / 2) * noise`. With None, the
            result is the posterior's mode. A VAE without a posterior (AutoencoderTiny) ignores the noise.
    """
    mean, logvar = posterior_moments(vae, images)
    return latents_from_moments(vae, mean, logvar, noise)


def posterior_moments(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return mean and log-variance (each B C h w, float32, raw VAE units) of q(z | images); images B 3 H W in [-1, 1].

    The log-variance is None for a VAE whose encoder is deterministic (AutoencoderTiny, VQModel).
    """
    with _running_precision(vae, images.device) as dtype:
        encoded: Any = vae.encode(images.to(dtype))
    if hasattr(encoded, "latent_dist"):
        return _at_least_float32(encoded.latent_dist.mean), _at_least_float32(encoded.latent_dist.logvar)
    for field in ("latents", "latent"):
        if hasattr(encoded, field):
            return _at_least_float32(getattr(encoded, field)), None
    raise TypeError(
        f"{type(vae).__name__}.encode returned {type(encoded).__name__}, which has no latent_dist and no latents"
    )


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draw from N(mean, exp(logvar)) with standard normal `noise`; all three have the same shape and dtype."""
    return mean + torch.exp(0.5 * logvar) * noise


def latents_from_moments(vae: nn.Module, mean: Tensor, logvar: Tensor | None, noise: Tensor | None = None) -> Tensor:
    """Return scaled latents (B C h w) from posterior moments in raw units, as `encode_latents` does from images."""
    z = _at_least_float32(mean)
    if noise is not None and logvar is not None:
        z = sample_posterior(z, logvar.to(z.dtype), noise.to(z.dtype))
    return scale_latents(vae, z)


def scale_latents(vae: nn.Module, z: Tensor) -> Tensor:
    """Convert latents in raw VAE units to scaled latents (B C h w; float32, or float64 for float64 input)."""
    z = _at_least_float32(z)
    shift, std, factor = _scaling(vae, z)
    return (z - shift) / std * factor


def unscale_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Convert scaled latents to raw VAE units; the exact inverse of `scale_latents`."""
    latents = _at_least_float32(latents)
    shift, std, factor = _scaling(vae, latents)
    return latents / factor * std + shift


def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Decode scaled latents (B C h w) to images (B 3 H W, float32, clamped to [-1, 1])."""
    z = unscale_latents(vae, latents)
    with _running_precision(vae, z.device) as dtype:
        images = vae.decode(z.to(dtype)).sample
    return images.float().clamp(-1, 1)


def latent_channels(vae: nn.Module) -> int:
    """Return the number of latent channels C."""
    return int(vae.config.latent_channels)


def image_channels_of(vae: nn.Module) -> int:
    """Return the number of channels of the images that a VAE encodes: 1 grey, 3 RGB, 4 RGB and alpha."""
    if type(vae).__name__ == "PixelAutoencoder":
        return int(vae.config.latent_channels)
    return int(vae.config.get("in_channels") or 3)


def downsampling_factor(vae: nn.Module) -> int:
    """Return the number of pixels per latent cell along a side, including the patches of an autoencoder on patches."""
    config = vae.config
    if getattr(vae, "spatial_compression_ratio", None):  # MultiHeadAutoencoderKL and AutoencoderDC have it
        return int(vae.spatial_compression_ratio)
    for name in ("encoder_block_out_channels", "block_out_channels"):
        if config.get(name):
            return 2 ** (len(config[name]) - 1)
    raise ValueError(f"the downsampling of {type(vae).__name__} is unknown: its config has no block_out_channels")


def latent_shape(vae: nn.Module, height: int, width: int) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of the latents of an image of height x width pixels.

    Raises:
        ValueError: a side is not a positive multiple of the VAE's downsampling.
    """
    factor = downsampling_factor(vae)
    for name, side in (("height", height), ("width", width)):
        if side < factor or side % factor:
            near = max(factor, round(side / factor) * factor)
            raise ValueError(
                f"`{name}` must be a multiple of {factor} (the VAE's downsampling) but is {side}; try {near}"
            )
    return latent_channels(vae), height // factor, width // factor


def write_latent_statistics(vae: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write measured statistics of raw latents (one number per channel) into the VAE's config, so that scaled latents
    have mean 0 and standard deviation 1.

    A class with the arguments `latents_mean` and `latents_std` gets both, and `scaling_factor` 1, because SDXL's rule
    multiplies by that as well. A class without them (AutoencoderTiny) gets only a scaling factor, 1 / the root mean
    square of std, because stock pipelines read nothing else from its config.
    """
    known = inspect.signature(type(vae).__init__).parameters
    if "latents_mean" in known and "latents_std" in known:
        numbers: dict[str, Any] = {
            "latents_mean": [float(m) for m in mean],
            "latents_std": [float(s) for s in std],
            "scaling_factor": 1.0,
        }
    else:
        numbers = {"scaling_factor": float(torch.tensor(list(std), dtype=torch.float64).square().mean().rsqrt())}
    # `from_config(vae.config)` drops the keys listed as default values, which would undo what is written here.
    defaults = [name for name in vae.config.get("_use_default_values", []) if name not in numbers]
    vae.register_to_config(**numbers, _use_default_values=defaults)


def _scaling(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (shift, std, factor), each broadcastable against B C h w, in the dtype and on the device of `like`."""
    config = vae.config

    def number(name: str, neutral: float) -> Tensor:
        value = config.get(name)
        numbers = tuple(value) if isinstance(value, (list, tuple)) else neutral if value is None else value
        value = _constant(numbers, like.dtype, like.device)
        if value.ndim == 1 and value.numel() != like.shape[1]:
            raise ValueError(f"the VAE's config has {value.numel()} {name}, but latents have {like.shape[1]} channels")
        return value.reshape(1, -1, 1, 1)

    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        return number("latents_mean", 0.0), number("latents_std", 1.0), number("scaling_factor", 1.0)
    return number("shift_factor", 0.0), number("neutral", 1.0), number("scaling_factor", 1.0)


def _constant(numbers: float | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor. It is kept, as a copy to a GPU in every training step would make the process wait."""
    make = _make_constant.__wrapped__ if torch.compiler.is_compiling() else _make_constant
    return make(numbers, dtype, device)


@functools.lru_cache(maxsize=64)
def _make_constant(numbers: float | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextlib.contextmanager
def _running_precision(vae: nn.Module, device: torch.device) -> Iterator[torch.dtype]:
    """Yield the dtype in which the VAE runs in this context.

    With `force_upcast` that is float32, and autocast is disabled; the VAE's own dtype is restored afterwards.
    """
    dtype = vae.dtype
    if not vae.config.get("force_upcast"):
        yield dtype
        return
    upcast = dtype in (torch.float16, torch.bfloat16)
    if upcast:
        vae.to(dtype=torch.float32)
    try:
        with torch.autocast(device_type=device.type, enabled=False):
            yield torch.float32 if upcast else dtype
    finally:
        if upcast:
            vae.to(dtype=dtype)


def concat_condition(noisy: Tensor, expected: Tensor | None) -> Tensor:
    """Concatenate noisy latents (B C h w) and the caption prior's predicted latents to the network's input (B 2C h w).

    For a model without a caption prior, `expected` is None and the noisy latents are returned. No gradient flows into
    `expected`: the prior is trained by regression alone, so it predicts the mean of the latents and does not adapt to
    the denoiser.
    """
    return noisy if expected is None else torch.cat([noisy, expected.detach().to(noisy.dtype)], dim=1)
