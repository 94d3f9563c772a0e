"""A perceptual loss with any vision backbone of Transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.tools.checkpoint_links import follow_links_or_name
from pipelines.tools.cli import UserError

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class PerceptualLoss(nn.Module):
    """Distance of two images in the features of a frozen backbone.

    It follows LPIPS (Zhang et al. 2018) without its learned weights: feature vectors are normalized over channels, and
    squared differences are averaged over positions and stages.

    Args:
        name_or_path: a model that `transformers.AutoBackbone` loads (ResNet, ConvNeXt, DINOv2, Swin, …).

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(self, name_or_path: str):
        super().__init__()
        from transformers import AutoBackbone, AutoConfig
        from transformers.image_processing_base import ImageProcessingMixin

        name_or_path = follow_links_or_name(name_or_path)
        try:
            # AutoBackbone.from_pretrained always asks the Hub first, even if the name is that of a folder.
            config = AutoConfig.from_pretrained(name_or_path)
            config.out_features = [name for name in config.stage_names if name != "stem"]
            backbone_class = type(AutoBackbone.from_config(config))
            self.backbone = backbone_class.from_pretrained(name_or_path, config=config)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"--perceptual_backbone {name_or_path} cannot be loaded ({str(error).splitlines()[0]}); "
                "give the name or folder of a vision backbone of Transformers, e.g. microsoft/resnet-18"
            ) from None
        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
        except OSError:
            processor = {}
        self.image_size = getattr(config, "image_size", None) if hasattr(config, "patch_size") else None
        self.register_buffer("mean", torch.tensor(processor.get("image_mean", _IMAGENET_MEAN)).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(processor.get("image_std", _IMAGENET_STD)).reshape(1, 3, 1, 1))

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Compute the distance, a scalar. `images`, `references`: B 3 H W in [-1, 1]; `references` get no gradient."""
        with torch.no_grad():
            targets = self._features(references)
        features = self._features(images)
        distances = [(f - t).square().sum(1).mean() for f, t in zip(features, targets, strict=True)]
        return torch.stack(distances).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        pixels = ((images + 1) / 2 - self.mean) / self.std
        if self.image_size is not None:  # its position embeddings are for one size only
            pixels = F.interpolate(pixels, size=self.image_size, mode="bilinear", antialias=True)
        return [F.normalize(feature, dim=1, eps=1e-6) for feature in self.backbone(pixels).feature_maps]
