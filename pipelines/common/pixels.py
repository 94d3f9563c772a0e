"""Converts PIL images to pixel tensors for networks (upright, in sRGB, with 8 bits), and alpha back from them.

Networks see a transparent image as four channels: its colours blended with white, and alpha. The colour of a pixel
that is fully transparent is undefined, and files have anything there; blended, it is white. What is nearly transparent
counts little in a loss, as it does for the eye. The first three channels are what the image is without alpha, so that
errors of the image on any background are sums of errors of the channels, and are not divided by a small alpha.
PIL images, arrays and tensors that users see have their own colours as usual (straight alpha).

Shapes: B images, C channels, H W pixels.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

import functools
import io
import struct

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

ORIENTATION = 0x0112  # the EXIF tag
# Modes whose colours a profile describes directly; images of all other modes are converted to RGB before.
PROFILE_MODES = {"1": "L", "L": "L", "LA": "L", "La": "L", "CMYK": "CMYK", "LAB": "LAB"}
PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK", "LAB": "Lab "}
# Profiles of sRGB differ in the rounding of their tables. A profile that changes no colour by more is one of sRGB.
SRGB_TOLERANCE = 1


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""The mode of Pillow for each number of channels of a model's images"""
LEAST_ALPHA = 0.5 / 255  # less becomes 0 in a file


def pixel_channels(*images: Image.Image) -> Tensor:
    """Return the channels of 8-bit images of one size, one image after another, as C H W, uint8."""
    channels_last = np.concatenate([np.atleast_3d(np.array(image, dtype=np.uint8)) for image in images], axis=2)
    return torch.from_numpy(channels_last).movedim(2, 0)


def image_channels(image: Image.Image) -> Tensor:
    """Return an RGB, RGBA or grey image as networks see it: C H W, uint8, with the colours of RGBA on white."""
    if image.mode != "RGBA":
        return pixel_channels(image)
    return pixel_channels(on_white(image), image.getchannel("A"))


def blended(images: Tensor) -> Tensor:
    """Blend images with straight alpha (B 4 H W in [-1, 1]) with white; images without alpha are left unchanged."""
    if images.shape[-3] != 4:
        return images
    colors, alpha = images[..., :3, :, :], images[..., 3:, :, :]
    opacity = (alpha.clamp(-1, 1) + 1) / 2
    return torch.cat([1 - (1 - colors) * opacity, alpha], dim=-3)


def straight(images: Tensor) -> Tensor:
    """Return images with straight alpha from blended ones (B 4 H W in [-1, 1]), the inverse of `blended`.

    Pixels that are fully transparent are white. Images without alpha are left unchanged.
    """
    if images.shape[-3] != 4:
        return images
    colors, alpha = images[..., :3, :, :], images[..., 3:, :, :]
    opacity = (alpha.clamp(-1, 1) + 1) / 2
    own = 1 - (1 - colors) / opacity.clamp(min=LEAST_ALPHA)
    return torch.cat([torch.where(opacity < LEAST_ALPHA, 1.0, own).clamp(-1, 1), alpha], dim=-3)


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned and mirrored as its EXIF orientation says, without that tag.

    Nothing else may apply the orientation or derive a size from the tag: some decoders (TIFF) turn their images
    themselves when the pixels are decoded.
    """
    image.load()
    return ImageOps.exif_transpose(image) if turned(image) else image  # `exif_transpose` copies an upright image


def turned(image: Image.Image) -> int:
    """Return the EXIF orientation of a decoded image, or 0 if it is upright; above 4, `upright` swaps its sides."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, struct.error):  # damaged EXIF; the pixels are intact
        return 0
    return orientation if orientation in range(2, 9) else 0


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any kind to 8-bit RGB, as training does.

    EXIF orientation is applied, colours are converted from the embedded profile to sRGB, transparent pixels are blended
    with white, and 16-bit or float grey values are scaled.

    Raises:
        ValueError: float pixels are not finite.
    """
    image = in_srgb(upright(image))
    return image if image.mode == "RGB" else on_white(image)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image of any kind to 8-bit "RGB", "RGBA" or "L", as `to_rgb` does; only RGBA keeps transparency.

    Raises:
        ValueError: float pixels are not finite.
    """
    if mode == "RGBA":
        return in_srgb(upright(image)).convert("RGBA")
    image = to_rgb(image)
    return image if mode == "RGB" else image.convert(mode)


def on_white(image: Image.Image) -> Image.Image:
    """Blend an RGBA image with white."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def in_srgb(image: Image.Image) -> Image.Image:
    """Convert an upright image of any mode to 8-bit sRGB: to RGBA if it has transparent pixels, otherwise to RGB.

    A profile that is damaged, or made for another kind of image than this one, is ignored. Alpha is never converted.

    Raises:
        ValueError: float pixels are not finite.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _from_deep_gray(image)
    transparent = image.has_transparency_data
    if image.mode == "LAB":
        profile = _lab_profile()
    converted = _converted(image, profile) if profile else None
    if not transparent:
        colors = converted or (image if image.mode == "RGB" else image.convert("RGB"))
    else:
        colors = image.convert("RGBA")
        if converted:
            converted.putalpha(colors.getchannel("A"))
            colors = converted
    return colors


def _converted(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Return an image's colours in sRGB, as RGB; None if they are in sRGB already, or the profile is unusable."""
    mode = PROFILE_MODES.get(image.mode, "RGB")
    transform = _transform(profile, mode)
    if transform is None:
        return None
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns of a palette with transparency that becomes RGB at once
    converted = transform.apply(image if image.mode == mode else image.convert(mode))
    converted.info.pop("icc_profile", None)  # images without a profile are in sRGB
    return converted


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of colours in `mode` to sRGB, or None if there is nothing to convert (see `_converted`).

    It is relative colorimetric with black point compensation: white and black stay white and black, and colours that
    sRGB has keep their appearance.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != PROFILE_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        sample = _sample(mode)
        if sample is not None:
            before = np.asarray(sample.convert("RGB"), dtype=np.int16)
            after = np.asarray(transform.apply(sample), dtype=np.int16)
            if np.abs(after - before).max() <= SRGB_TOLERANCE:
                return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform


def _sample(mode: str) -> Image.Image | None:
    """Return an image with colours from the whole range of a mode that sRGB can have; None for other modes."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    if mode != "RGB":
        return None
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3))


@functools.cache
def _lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def require_finite(image: Image.Image) -> None:
    """Raise a ValueError if float pixels of a decoded image are not finite."""
    if image.mode == "F" and (count := int((~np.isfinite(np.asarray(image))).sum())):
        raise ValueError(f"{count:,} of its {image.width * image.height:,} pixels are not finite numbers (NaN or inf)")


def _from_deep_gray(image: Image.Image) -> Image.Image:
    """Convert 16-bit, 32-bit or float grey to 8 bits. Pillow's `convert` clips them at 255, which turns scans white."""
    require_finite(image)
    values = np.asarray(image)
    brightest = values.max(initial=0)
    if image.mode == "F":
        scale = 255.0 if brightest <= 1 else 255 / 65535 if brightest > 255 else 1.0
    else:
        scale = 255 / 65535 if image.mode.startswith("I;16") or brightest > 255 else 1.0
    gray = np.empty(values.shape, np.uint8)
    for place, row in zip(gray, values):  # row by row, because float64 takes eight bytes per pixel
        place[:] = np.clip(row.astype(np.float64) * scale + 0.5, 0, 255)
    return Image.fromarray(gray)
