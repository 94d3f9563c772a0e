"""Reads and checks the arguments of pipelines that start from an image: `image`, `mask_image`, `strength` and others.

They are named as in the pipelines of Diffusers for image to image and for inpainting.

Shapes: B images, C channels, H W pixels.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from .checks import check_positive_integers, is_number
from .latents import encode_latents
from .pixels import MODES, blended, to_mode
from .starting_point import StartingPoint


@dataclass
class StartingImage:
    """Images from which sampling starts, in the size that is generated."""

    pixels: Tensor
    """B C H W in [-1, 1], with straight alpha."""
    strength: float
    mask: Tensor | None = None
    """B 1 H W, True where the image is filled; None without a mask."""
    jump_n_sample: int = 1
    paste_back: bool = False
    repeats: int = 1
    """Number of images that are generated for each prompt."""

    def point(self, vae: Any, noise: Tensor, prediction_type: str) -> StartingPoint:
        """Return where sampling starts: the latents of the images, or their pixels without a `vae`.

        The latents are the mode of the VAE's posterior, so that `noise` (B C h w) is all that is random. A latent cell
        is kept if none of its pixels is to be filled.

        Raises:
            ValueError: there is neither one image, nor one for each prompt or each generated image.
        """
        images = blended(self.pixels).to(noise.device)
        x_0 = images if vae is None else encode_latents(vae, images)
        keep = None
        if self.mask is not None:
            factor = self.mask.shape[-2] // noise.shape[-2], self.mask.shape[-1] // noise.shape[-1]
            keep = F.max_pool2d(self.mask.float(), factor).to(noise.device) < 0.5
            keep = self._for_each(keep, len(noise))
        return StartingPoint(
            self._for_each(x_0.float(), len(noise)), noise, self.strength, prediction_type, keep, self.jump_n_sample
        )

    def pasted(self, images: Tensor) -> Tensor:
        """Return generated images (B C H W in [-1, 1], straight alpha), with the given pixels outside of the mask if
        `paste_back` is set."""
        if not self.paste_back or self.mask is None:
            return images
        mask, pixels = (self._for_each(one, len(images)).to(images.device) for one in (self.mask, self.pixels))
        return torch.where(mask, images, pixels)

    def _for_each(self, rows: Tensor, count: int) -> Tensor:
        given = len(rows)
        if given not in (1, count, count // self.repeats):
            raise ValueError(
                f"`image` (or `mask_image`) has {given} entries, but there are {count // self.repeats} prompts or "
                "labels; pass one image, or one for each of them"
            )
        return rows.repeat_interleave(count // given, dim=0)


def starting_image(
    image: Any,
    mask_image: Any,
    strength: Any,
    jump_n_sample: Any,
    paste_back: Any,
    *,
    channels: int,
    size: tuple[int, int],
    repeats: int = 1,
    output_type: str = "pil",
) -> StartingImage | None:
    """Check and convert the arguments of a call that starts from an image; None for a call without an image.

    Args:
        image, mask_image, strength, jump_n_sample, paste_back: arguments of the pipeline.
        channels: number of channels of the images of the model.
        size: height and width in pixels of the generated images; image and mask are resized to it.

    Raises:
        ValueError: an argument cannot be used; the message quotes it.
    """
    _check_together(image, mask_image, strength, jump_n_sample, paste_back, output_type)
    if image is None:
        return None
    pixels, sizes = _read("image", image, channels)
    mask = None
    if mask_image is not None:
        masks, mask_sizes = _read("mask_image", mask_image, 1)
        _check_sizes(sizes, mask_sizes)
        mask = _resized(masks, size, VaeImageProcessor(vae_scale_factor=1, vae_latent_channels=0, do_normalize=False,
            do_binarize=True, do_convert_grayscale=True)) > 0.5  # fmt: skip
        if not mask.flatten(1).any(dim=1).all():
            raise ValueError(
                f"`mask_image` is empty: no pixel of it is white at {size[1]}×{size[0]} pixels, so there is nothing to "
                "fill; make the part white that is to be filled, and the rest black"
            )
    processor = VaeImageProcessor(vae_scale_factor=1, vae_latent_channels=0)
    chosen = 1.0 if strength is None else float(strength)
    again = 1 if jump_n_sample is None else int(jump_n_sample)
    return StartingImage(_resized(pixels, size, processor), chosen, mask, again, bool(paste_back), int(repeats))


def _check_together(
    image: Any, mask_image: Any, strength: Any, jump_n_sample: Any, paste_back: Any, output_type: str
) -> None:
    """Raise a ValueError if an argument lacks another one, or has no effect, or is not a number of its range."""
    if not isinstance(paste_back, (bool, np.bool_)):
        raise ValueError(f"`paste_back` must be True or False, but is {paste_back!r}")
    given = {"mask_image": mask_image, "strength": strength}
    for name, value in given.items():
        if image is None and value is not None:
            raise ValueError(f"`{name}` has no effect without `image`; pass the image to start from as well")
    needs_mask = {"jump_n_sample": jump_n_sample, "paste_back": paste_back or None}
    for name, value in needs_mask.items():
        if mask_image is None and value is not None:
            raise ValueError(f"`{name}` has no effect without `mask_image`; pass the part of the image to fill as well")
    if jump_n_sample is not None:
        check_positive_integers(jump_n_sample=jump_n_sample)
    if image is not None and strength is None and mask_image is None:
        raise ValueError(
            "`image` needs a `strength`, from 0 (the image stays as it is) to 1 (pure noise), such as 0.6; pass both"
        )
    if strength is not None and (not is_number(strength) or not 0 <= strength <= 1):
        raise ValueError(f"`strength` must be from 0 (the image stays as it is) to 1 (pure noise), but is {strength!r}")
    if paste_back and output_type == "latent":
        raise ValueError("`paste_back` pastes pixels, but `output_type` is 'latent'; use another `output_type`")


def _read(name: str, value: Any, channels: int) -> tuple[list[Image.Image] | Tensor, list[tuple[int, int]]]:
    """Return images as PIL images in the mode of the model or as a tensor (B C H W in [0, 1]), and their sizes.

    A size is (width, height).

    Raises:
        ValueError: they are neither PIL images nor tensors or arrays, or have another number of channels.
    """
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    if several and all(isinstance(one, Image.Image) for one in several):
        images = [_in_mode(name, one, MODES[channels]) for one in several]
        return images, [one.size for one in images]
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating) and value.ndim in (2, 3, 4):
        value = torch.from_numpy(value)
        value = value[None] if value.ndim == 2 else value.movedim(-1, -3)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim not in (3, 4):
        raise ValueError(
            f"`{name}` must be a PIL image, a list of them, or a floating-point tensor (C H W or B C H W) or array "
            f"(H W C or B H W C) in [0, 1], but is {_described(value)}"
        )
    batch = value.detach().float() if value.ndim == 4 else value.detach().float()[None]
    if batch.shape[1] != channels or 0 in batch.shape:
        raise ValueError(f"`{name}` must have {channels} channels, but has shape {tuple(value.shape)}")
    if not (batch.min() >= 0 and batch.max() <= 1):
        raise ValueError(f"`{name}` must lie in [0, 1], but lies in [{batch.min():.3g}, {batch.max():.3g}]")
    return batch, [(batch.shape[-1], batch.shape[-2])] * len(batch)


def _in_mode(name: str, image: Image.Image, mode: str) -> Image.Image:
    try:
        return to_mode(image, mode)
    except (OSError, SyntaxError) as error:  # the pixels are read here
        raise ValueError(f"`{name}` cannot be read ({error}); pass another image") from error


def _resized(images: list[Image.Image] | Tensor, size: tuple[int, int], processor: VaeImageProcessor) -> Tensor:
    """Return the image in another height and width, as Diffusers resizes: the aspect ratio may change."""
    return processor.preprocess(images, height=size[0], width=size[1])


def _check_sizes(sizes: list[tuple[int, int]], mask_sizes: list[tuple[int, int]]) -> None:
    """Raise a ValueError if there are several masks, but not one for each image, or if a mask has another size."""
    if len(mask_sizes) not in (1, len(sizes)) and len(sizes) != 1:
        raise ValueError(
            f"`mask_image` has {len(mask_sizes)} entries and `image` {len(sizes)}; pass one mask, or one for each image"
        )
    count = max(len(sizes), len(mask_sizes))
    for number in range(count):
        own, mask = sizes[number % len(sizes)], mask_sizes[number % len(mask_sizes)]
        if own != mask:
            raise ValueError(
                f"`mask_image` must have the size of `image`, {own[0]}×{own[1]} pixels (width × height), but has "
                f"{mask[0]}×{mask[1]}; resize the mask"
            )


def _described(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"one of {value.dtype} with shape {tuple(value.shape)}"
    return repr(value)
