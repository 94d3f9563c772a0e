"""Encode images to latents and decode latents with any Diffusers autoencoder; with heads, segment and classify images.

Shapes: B images, H W pixels, C latent channels, h w latent cells, K pixel classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from .common.checks import OUTPUT_TYPES, check_generator, check_output_type
from .common.class_colors import class_ids_to_pil
from .common.latents import (
    decode_latents,
    downsampling_factor,
    encode_latents,
    image_channels_of,
    latent_channels,
    latent_shape,
    posterior_moments,
)
from .common.pixels import MODES, blended, image_channels, straight, to_mode
from .common.sampling import generator_per_image, initial_noise
from .common.standalone import StandalonePipelineMixin


class AutoencoderPipeline(StandalonePipelineMixin, DiffusionPipeline):
    """Pipeline that reconstructs images and converts them to and from scaled latents, the input of a diffusion model.

    If the autoencoder has heads, `segment` predicts the class of each pixel and `classify` the class of each image; the
    names of the classes are in `pipeline.vae.config`.

    All methods take images as a PIL image, a list of PIL images of one size, an array (`B H W 3`, in [0, 1]) or a
    tensor (`B 3 H W`, in [0, 1]). PIL images are turned as their EXIF orientation says, and converted to sRGB. An
    autoencoder for grey images (`vae.config.in_channels` is 1) has 1 channel instead of 3, one for images with
    transparency 4: colours and alpha, not premultiplied.

    Args:
        vae (`ModelMixin`): Any Diffusers image autoencoder.
    """

    model_cpu_offload_seq = "vae"

    def __init__(self, vae: ModelMixin):
        super().__init__()
        self.register_modules(vae=vae)
        self.vae_scale_factor = downsampling_factor(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        generator: int | torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Encode images and decode their latents, at the size of the images.

        Args:
            images (`PIL.Image.Image`, `list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The images to
                reconstruct, see the class.
            generator (`int`, `torch.Generator` or a list, *optional*): Seed (image k uses seed + k) or generator for
                sampling the latents from the posterior, or one generator for each image. By default, the mode is used.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (`B H W 3`, in [0, 1]), `"pt"` (`B 3 H W`, in
                [0, 1]) or `"latent"` (scaled latents, `B C h w`).
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput` instead of a tuple.

        Returns:
            `ImagePipelineOutput` or `tuple`: The reconstructed images, or the latents for `output_type="latent"`; a
            tuple with them as its only element if `return_dict` is `False`.

        Raises:
            ValueError: If the output type is unknown, or a side of the images is not a multiple of the downsampling
                factor.
        """
        check_output_type(output_type, (*OUTPUT_TYPES, "latent"))
        result: Any = self.encode(images, generator)
        if output_type != "latent":
            result = self._finished(decode_latents(self.vae, result), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def reconstruct(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> list[Image.Image]:
        """Encode and decode `images`, and return the reconstructions as PIL images."""
        return self(images).images  # type: ignore[union-attr]

    @torch.no_grad()
    def encode(self, images: Any, generator: int | torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Encode images to scaled latents.

        Args:
            images (`PIL.Image.Image`, `list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The images to encode,
                see the class.
            generator (`int`, `torch.Generator` or a list, *optional*): Seed (image k uses seed + k) or generator for
                sampling the latents from the posterior, or one generator for each image. By default, the mode is used.

        Returns:
            `torch.Tensor`: The scaled latents, `B C h w`, float32.

        Raises:
            ValueError: If a side of the images is not a multiple of the downsampling factor.
        """
        check_generator(generator)
        pixels = self._pixels(images).to(self._execution_device)
        noise = None
        if generator is not None:
            shape = (len(pixels), *latent_shape(self.vae, *pixels.shape[-2:]))
            noise = initial_noise(shape, generator_per_image(generator, len(pixels)), pixels.device)
        return encode_latents(self.vae, pixels, noise)

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Decode scaled latents (`B C h w`) to images of `output_type` (`"pil"`, `"np"` or `"pt"`)."""
        check_output_type(output_type)
        if not isinstance(latents, Tensor) or latents.ndim != 4 or latents.shape[1] != latent_channels(self.vae):
            raise ValueError(f"`latents` must have shape (B, {latent_channels(self.vae)}, h, w), but is {latents!r}")
        images = decode_latents(self.vae, latents.to(self._execution_device))
        return self._finished(images, output_type)

    @torch.no_grad()
    def segment(self, images: Any, output_type: str = "pil") -> Any:
        """Predict the class of each pixel from the latents of the images.

        Args:
            images (`PIL.Image.Image`, `list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The images to segment,
                see the class.
            output_type (`str`, defaults to `"pil"`): `"pil"` (a list of palette images whose pixels are class ids,
                shown in the colours of `class_colors`), `"np"` (`B H W`, class ids as uint8) or `"pt"` (`B K H W`,
                probabilities as float32).

        Returns:
            `list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`: The predicted masks.

        Raises:
            ValueError: If the autoencoder has no segmentation head, the output type is unknown, or a side of the images
                is not a multiple of the downsampling factor.
        """
        check_output_type(output_type)
        z = self._raw_latents(images, "num_mask_classes", "segmentation")
        logits = self.vae.segment(z)
        self.maybe_free_model_hooks()
        if output_type == "pt":
            return logits.float().softmax(1)
        ids = logits.argmax(1).to(torch.uint8).cpu().numpy()
        return ids if output_type == "np" else [class_ids_to_pil(mask) for mask in ids]

    @torch.no_grad()
    def classify(self, images: Any) -> list[dict[str, float]]:
        """Predict the class of each image from its latents.

        Args:
            images (`PIL.Image.Image`, `list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The images to classify,
                see the class.

        Returns:
            `list[dict[str, float]]`: For each image, the probability of each class by its name, in descending order.

        Raises:
            ValueError: If the autoencoder has no classification head, or a side of the images is not a multiple of the
                downsampling factor.
        """
        z = self._raw_latents(images, "num_classes", "classification")
        logits = self.vae.classify(z)
        self.maybe_free_model_hooks()
        names = self.vae.config.id2label or {}
        shares, ids = logits.float().softmax(1).sort(descending=True)
        return [
            {names.get(str(id_), str(id_)): share for id_, share in zip(*row)}
            for row in zip(ids.tolist(), shares.tolist())
        ]

    def _finished(self, images: Tensor, output_type: str) -> Any:
        return self.image_processor.postprocess(straight(images), output_type=output_type)

    def _raw_latents(self, images: Any, number: str, head: str) -> Tensor:
        """Return the unscaled latents of `images` (the mode of the posterior, B C h w) in the autoencoder's dtype."""
        if not self.vae.config.get(number):
            raise ValueError(f"`vae` has no {head} head (`{number}` is missing from its config, or 0)")
        pixels = self._pixels(images).to(self._execution_device)
        return posterior_moments(self.vae, pixels)[0].to(self.vae.dtype)

    def _pixels(self, images: Any) -> Tensor:
        """Convert images of any accepted kind to a tensor as the autoencoder takes it, B C H W in [-1, 1], float32."""
        channels = image_channels_of(self.vae)
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        kinds = {kind for kind in (Image.Image, np.ndarray, Tensor) for image in images if isinstance(image, kind)}
        if len(kinds) != 1 or not all(isinstance(image, tuple(kinds)) for image in images):
            found = ", ".join(sorted({type(image).__name__ for image in images})) or "empty"
            raise ValueError(f"`images` must be PIL images, an array or a tensor, but is {found}")
        if kinds == {Image.Image}:
            images = [to_mode(image, MODES[channels]) for image in images]
            sizes = {image.size for image in images}
            if len(sizes) > 1:
                raise ValueError(f"`images` must all have the same size, but have {sorted(sizes)} (width, height)")
        elif any(image.ndim not in (3, 4) or image.size == 0 for image in images):
            raise ValueError(f"`images` must have 3 or 4 dimensions, but have {[tuple(i.shape) for i in images]}")
        first = images[0]
        if isinstance(first, Image.Image):
            width, height = first.size
        else:
            height, width = first.shape[-2:] if isinstance(first, Tensor) else first.shape[-3:-1]
        # Check the size here, because the image processor would silently resize the images to one that fits.
        latent_shape(self.vae, height, width)
        if channels != 3:
            return self._unusual_pixels(images, channels)
        pixels = images if isinstance(first, Image.Image) or len(images) > 1 else first
        return self.image_processor.preprocess(pixels, height=height, width=width).float()

    @staticmethod
    def _unusual_pixels(images: list[Any], channels: int) -> Tensor:
        """Do what the image processor does for RGB: it would take four channels for latents."""
        if isinstance(images[0], Image.Image):
            return torch.stack([image_channels(image) for image in images]).float() / 127.5 - 1
        parts = [torch.as_tensor(image) for image in images]
        if isinstance(images[0], np.ndarray):
            parts = [part.movedim(-1, -3) for part in parts]
        pixels = torch.cat([part if part.ndim == 4 else part[None] for part in parts]).float()
        if pixels.shape[1] != channels:
            raise ValueError(f"`images` must have {channels} channels, but have {pixels.shape[1]}")
        return blended(pixels * 2 - 1)
