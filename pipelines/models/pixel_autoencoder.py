"""PixelAutoencoder: the identity, in the place of an autoencoder, for models that denoise pixels.

This file is shipped beside the weights of published models, so it imports no other file of Halftone.
"""

from typing import Union

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """An autoencoder whose latents are the pixels, so that pipelines for latents work with models of pixels.

    Args:
        latent_channels: number of colour channels of the images.
        scaling_factor: factor by which the pixels, in [-1, 1], are multiplied for the diffusion model.
    """

    spatial_compression_ratio = 1

    @register_to_config
    def __init__(self, latent_channels: int = 3, scaling_factor: float = 1.0):
        super().__init__()
        # A module without any tensor has no dtype and no device.
        self.register_buffer("one", torch.ones(()))

    def encode(self, x: Tensor, return_dict: bool = True) -> Union[AutoencoderTinyOutput, tuple]:
        """Return the images (B C H W) as latents."""
        return AutoencoderTinyOutput(latents=x) if return_dict else (x,)

    def decode(self, z: Tensor, return_dict: bool = True) -> Union[DecoderOutput, tuple]:
        """Return the latents (B C H W) as images."""
        return DecoderOutput(sample=z) if return_dict else (z,)
