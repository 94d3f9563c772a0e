"""A poster's picture to its feature tensor (F_Tensor): where text and pictures are, what each colour is for, what leads
the eye.

Shapes: B pictures, H W pixels, p patch side, K colour roles.

The network is a U-Net after Ronneberger, Fischer and Brox (2015): two convolutions a level, skips across, and four
heads on the last feature map. Group norm and padded convolutions stand where the original has none.

This file is shipped beside the weights of published models, so it imports nothing of ours.
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
    """What the four heads say of every pixel.

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
        """B (3 + K) H W in [0, 1]: text, image, K roles, hierarchy. What the grammar's abstractor takes."""
        masks = torch.cat([self.text_mask, self.image_mask], 1).float().sigmoid()
        return torch.cat([masks, self.color_role.float().softmax(1), self.hierarchy.float()], 1)

    def f_tensor(self) -> Tensor:
        """B 4 H W: text mask {0, 1}, image mask {0, 1}, colour role (a class id), hierarchy [0, 1]."""
        masks = (torch.cat([self.text_mask, self.image_mask], 1) > 0).float()
        role = self.color_role.argmax(1, keepdim=True).float()
        return torch.cat([masks, role, self.hierarchy.float()], 1)


class LayoutEncoderModel(ModelMixin, ConfigMixin):
    """P_Image → F_Tensor.

    Args:
        block_out_channels: channels of each level; every level halves the sides. The default has 31 million
            parameters.
        patch_size: p; the network works on p × p patches of pixels and answers for every pixel of them. 1 is the
            U-Net as published; 2 takes a quarter of the time.
        num_color_roles: K.
        norm_num_groups: of the group norms; it must divide every number of channels.
        sample_size: side of the pictures that it was trained on, in pixels.
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
        """Sides are padded to multiples of this, and the answer is cut back."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def forward(self, pixel_values: Tensor) -> LayoutEncoderOutput:
        """B 3 H W in [-1, 1] → LayoutEncoderOutput at the same H W, whatever they are."""
        height, width = pixel_values.shape[-2:]
        padding = (0, -width % self.divisor, 0, -height % self.divisor)
        # Replicated borders look like more of the page; zeros would look like a grey frame.
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
    """Twice: 3 × 3 convolution, group norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        layers: list[nn.Module] = []
        for channels in (channels_in, channels_out):
            layers += [
                nn.Conv2d(channels, channels_out, 3, padding=1, bias=False),
                nn.GroupNorm(groups, channels_out),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)
