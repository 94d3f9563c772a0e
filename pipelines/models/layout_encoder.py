"""LayoutEncoderModel: predicts a poster's feature tensor from its image (P_Image → F_Tensor): where text and images
are, which role each colour has, and how strongly each element leads the eye.

Shapes: B images, H W pixels, p patch side, K colour roles.

The network is a U-Net after Ronneberger, Fischer and Brox (2015): two convolutions per level, skip connections, and
four heads on the last feature map. Unlike the original, it has group normalization and padded convolutions.

This file is shipped beside the weights of published models, so it imports no other file of Halftone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class LayoutEncoderOutput(BaseOutput):
    """Predictions of the four heads for every pixel.

    Args:
        text_mask, image_mask: B 1 H W, logits.
        color_role: B K H W, logits.
        hierarchy: B 1 H W, in [0, 1].
    """

    text_mask: Tensor
    image_mask: Tensor
    color_role: Tensor
    hierarchy: Tensor

    def probabilities(self) -> Tensor:
        """Return B (3 + K) H W in [0, 1]: text, image, K roles, hierarchy; the input of the grammar abstractor."""
        masks = torch.cat([self.text_mask, self.image_mask], 1).float().sigmoid()
        return torch.cat([masks, self.color_role.float().softmax(1), self.hierarchy.float()], 1)

    def f_tensor(self) -> Tensor:
        """Return B 4 H W: text mask {0, 1}, image mask {0, 1}, colour role (a class id), hierarchy [0, 1]."""
        masks = (torch.cat([self.text_mask, self.image_mask], 1) > 0).float()
        role = self.color_role.argmax(1, keepdim=True).float()
        return torch.cat([masks, role, self.hierarchy.float()], 1)


class LayoutEncoderModel(ModelMixin, ConfigMixin):
    """Predict text mask, image mask, colour roles and hierarchy for every pixel of a poster.

    Args:
        block_out_channels: channels of each level; every level after the first halves the sides. The default has 31
            million parameters.
        patch_size: side p of the pixel patches that the network works on; it still predicts every pixel. 1 is the
            U-Net as published; 2 takes about a quarter of the time.
        num_color_roles: number of colour roles K.
        norm_num_groups: number of groups for group normalization; it must divide every entry of `block_out_channels`.
        sample_size: side of the training images in pixels.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        block_out_channels: Sequence[int] = (64, 128, 256, 512, 1024),
        patch_size: int = 1,
        num_color_roles: int = 6,
        norm_num_groups: int = 8,
        sample_size: int = 256,
    ):
        super().__init__()
        widths = list(block_out_channels)
        self.gradient_checkpointing = False
        cells = patch_size**2
        self.unshuffle, self.shuffle = nn.PixelUnshuffle(patch_size), nn.PixelShuffle(patch_size)
        inputs = [3 * cells, *widths[:-1]]
        self.down = nn.ModuleList(_DoubleConv(a, b, norm_num_groups) for a, b in zip(inputs, widths, strict=True))
        narrower = list(zip(widths[::-1][:-1], widths[::-1][1:], strict=True))
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in narrower)
        self.up = nn.ModuleList(_DoubleConv(2 * b, b, norm_num_groups) for _, b in narrower)
        self.heads = nn.ModuleDict(
            {
                "text_mask": nn.Conv2d(widths[0], cells, 1),
                "image_mask": nn.Conv2d(widths[0], cells, 1),
                "color_role": nn.Conv2d(widths[0], num_color_roles * cells, 1),
                "hierarchy": nn.Conv2d(widths[0], cells, 1),
            }
        )

    @property
    def divisor(self) -> int:
        """The number to whose multiples the sides of an input are padded; the output is cropped again."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def forward(self, pixel_values: Tensor) -> LayoutEncoderOutput:
        """Predict from images B 3 H W in [-1, 1], of any H and W; the output has the same H and W."""
        height, width = pixel_values.shape[-2:]
        padding = (0, -width % self.divisor, 0, -height % self.divisor)
        # Replicated borders look like a larger page; zeros would look like a grey frame.
        x = self.unshuffle(F.pad(pixel_values, padding, mode="replicate") if any(padding) else pixel_values)
        skips = []
        for number, block in enumerate(self.down):
            x = self._run(block, x if number == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for upsample, block, skip in zip(self.upsample, self.up, reversed(skips[:-1]), strict=True):
            x = self._run(block, torch.cat([skip, upsample(x)], 1))
        maps = {name: self.shuffle(head(x))[..., :height, :width] for name, head in self.heads.items()}
        return LayoutEncoderOutput(**{**maps, "hierarchy": maps["hierarchy"].sigmoid()})

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x)
        return block(x)


class _DoubleConv(nn.Sequential):
    """3 × 3 convolution, group normalization and ReLU, twice."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        layers: list[nn.Module] = []
        for channels in (channels_in, channels_out):
            layers += [
                nn.Conv2d(channels, channels_out, 3, padding=1, bias=False),
                nn.GroupNorm(groups, channels_out),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)
