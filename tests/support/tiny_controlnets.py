"""Tiny ControlNets whose parameters are changed, as if trained, and pipelines with them."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.fusion_controlnet_pipeline import FusionControlNetPipeline
from pipelines.models.fusion_controlnet import FusionControlNetModel
from pipelines.poster_controlnet_pipeline import PosterControlNetPipeline
from tests.pipelines.test_poster_decoder import tiny_decoder
from tests.support.tiny_models import tiny_pipeline

MASKS: dict[str, Any] = {
    "control_kind": "masks",
    "conditioning_channels": 2,
    "control_names": ("text_mask", "image_mask"),
}
CLASSES: dict[str, Any] = {"control_kind": "classes", "conditioning_channels": 3, "control_names": ("color_role",)}
PICTURE: dict[str, Any] = {"control_kind": "image", "conditioning_channels": 3}


def tiny_net(base: Any, mode: str = "add", control: dict[str, Any] = MASKS, seed: int = 6) -> FusionControlNetModel:
    """Make a ControlNet for the pipeline `base`; every parameter differs from its initial value."""
    torch.manual_seed(seed)
    downsampling = getattr(base, "vae_scale_factor", 1)
    net = FusionControlNetModel.from_unet(base.unet, fusion_mode=mode, downsampling=downsampling, **control).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def controlled(base: Any, *nets: FusionControlNetModel) -> Any:
    """Add these ControlNets to the pipeline `base` (latent diffusion or poster decoder), sharing its components."""
    pipeline_class = PosterControlNetPipeline if hasattr(base, "brief_encoder") else FusionControlNetPipeline
    config = {} if hasattr(base, "brief_encoder") else {"id2label": base.config.id2label}
    pipeline = pipeline_class(**base.components, **config, controlnet=nets[0] if len(nets) == 1 else list(nets))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_controlled(mode: str = "add", control: dict[str, Any] = MASKS, **options: Any) -> FusionControlNetPipeline:
    base = tiny_pipeline(**options)
    return controlled(base, tiny_net(base, mode, control))


def tiny_controlled_decoder(mode: str = "add", control: dict[str, Any] = MASKS) -> PosterControlNetPipeline:
    base = tiny_decoder()
    return controlled(base, tiny_net(base, mode, control))
