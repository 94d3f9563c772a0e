"""Halftone's pipelines, as in `from pipelines import LatentDiffusionPipeline`.

Each class is imported on first access: importing any module of this package runs this file, and importing torch and
Diffusers takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .autoencoder import AutoencoderPipeline
    from .fusion_controlnet_pipeline import FusionControlNetPipeline
    from .image_caption import ImageCaptionPipeline
    from .latent_diffusion import LatentDiffusionPipeline
    from .layout_analysis import LayoutAnalysisPipeline
    from .poster_controlnet_pipeline import PosterControlNetPipeline
    from .poster_decoder import PosterDecoderPipeline

__all__ = [
    "AutoencoderPipeline",
    "FusionControlNetPipeline",
    "ImageCaptionPipeline",
    "LatentDiffusionPipeline",
    "LayoutAnalysisPipeline",
    "PosterControlNetPipeline",
    "PosterDecoderPipeline",
]

_MODULES = {
    "AutoencoderPipeline": "autoencoder",
    "FusionControlNetPipeline": "fusion_controlnet_pipeline",
    "ImageCaptionPipeline": "image_caption",
    "LatentDiffusionPipeline": "latent_diffusion",
    "LayoutAnalysisPipeline": "layout_analysis",
    "PosterControlNetPipeline": "poster_controlnet_pipeline",
    "PosterDecoderPipeline": "poster_decoder",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
