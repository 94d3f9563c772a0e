"""Images to latents and back, with any Diffusers autoencoder; and what its heads read in them, where it has any.

Shapes: B pictures, H W pixels, C latent channels, h w latent cells, K classes of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from .common.checks import OUTPUT_TYPES, check_output_type
from .common.class_colors import class_ids_to_pil
from .common.latents import decode_latents, downsampling_factor, encode_latents, latent_shape, posterior_moments
from .common.standalone import StandalonePipelineMixin


class AutoencoderPipeline(StandalonePipelineMixin, DiffusionPipeline):
    """Reconstructs pictures, and gives their latents in the scaled units that a diffusion model sees.

    With an autoencoder that has heads, it also says what every pixel shows (`segment`) and what a picture is
    (`classify`); the names of the classes are in `pipeline.vae.config`.

    Pictures go in as PIL images, a list of them, arrays (B H W 3, in [0, 1]) or tensors (B 3 H W, in [0, 1]).

    Args:
        vae: any Diffusers autoencoder of images.
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
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Encode and decode `images`, at their own size.

        Args:
            generator: draws from the posterior; None takes its mode.
            output_type: pil; np (B H W 3, in [0, 1]); pt (B 3 H W, in [0, 1]); or latent (B C h w, scaled).

        Raises:
            ValueError: an unknown output type, or a side that is no multiple of the downsampling.
        """
        check_output_type(output_type, (*OUTPUT_TYPES, "latent"))
        result: Any = self.encode(images, generator)
        if output_type != "latent":
            result = self.image_processor.postprocess(decode_latents(self.vae, result), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def reconstruct(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> list[Image.Image]:
        """`images` after a trip through the latents, as PIL images."""
        return self(images).images  # type: ignore[union-attr]

    @torch.no_grad()
    def encode(self, images: Any, generator: torch.Generator | None = None) -> Tensor:
        """`images` to scaled latents (B C h w, float32): the posterior's mode, or a draw from it with `generator`.

        Raises:
            ValueError: a side that is no multiple of the downsampling.
        """
        pixels = self._pixels(images).to(self._execution_device)
        noise = None
        if generator is not None:
            shape = (len(pixels), *latent_shape(self.vae, *pixels.shape[-2:]))
            noise = torch.randn(shape, generator=generator, device=generator.device).to(pixels.device)
        return encode_latents(self.vae, pixels, noise)

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Scaled latents (B C h w) to pictures of `output_type` (pil, np or pt)."""
        images = decode_latents(self.vae, latents.to(self._execution_device))
        return self.image_processor.postprocess(images, output_type=output_type)

    @torch.no_grad()
    def segment(self, images: Any, output_type: str = "pil") -> Any:
        """What every pixel of `images` shows, read from their latents.

        Args:
            output_type: pil (a list of pictures with a palette: their pixels are class ids, shown in the colours of
                `class_colors`); np (B H W, uint8 class ids); or pt (B K H W, float32 probabilities).

        Raises:
            ValueError: no segmentation head, an unknown output type, or a side that is no multiple of the downsampling.
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
        """The classes of each picture, read from its latents: name to probability, the most probable first.

        Raises:
            ValueError: no classification head, or a side that is no multiple of the downsampling.
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

    def _raw_latents(self, images: Any, number: str, head: str) -> Tensor:
        """The posterior's mode of `images` in the autoencoder's own units and precision, B C h w."""
        if not self.vae.config.get(number):
            raise ValueError(f"`vae` has no {head} head: `{number}` is not in its config, or 0")
        pixels = self._pixels(images).to(self._execution_device)
        return posterior_moments(self.vae, pixels)[0].to(self.vae.dtype)

    def _pixels(self, images: Any) -> Tensor:
        """B 3 H W in [-1, 1], float32."""
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if all(isinstance(image, Image.Image) for image in images):
            sizes = {image.size for image in images}
            if len(sizes) > 1:
                raise ValueError(f"`images` must be of one size, but are {sorted(sizes)} (width, height)")
            images = [image.convert("RGB") for image in images]
        first = images[0]
        if isinstance(first, Image.Image):
            width, height = first.size
        else:
            height, width = first.shape[-2:] if isinstance(first, Tensor) else first.shape[-3:-1]
        # Checked here because the image processor would quietly resize to a size that fits.
        latent_shape(self.vae, height, width)
        pixels = images if isinstance(first, Image.Image) or len(images) > 1 else first
        return self.image_processor.preprocess(pixels, height=height, width=width).float()
