"""What a poster is made of: its feature tensor, its design grammar, and a picture that shows both.

Shapes: H W pixels of a poster as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from PIL import Image, ImageOps
from torch import Tensor

from .common.layout_pictures import draw_overlay
from .common.pixels import pixel_channels
from .common.poster_domain import COLOR_ROLES, COUNTS, GRAMMAR
from .common.standalone import StandalonePipelineMixin


@dataclass
class LayoutAnalysisOutput(BaseOutput):
    """One entry for each picture.

    Args:
        features: F_Tensor, NumPy float32 4 × H × W: text mask, image mask {0, 1}, colour role (class id), hierarchy
            [0, 1].
        overlays: the picture with its text and pictures marked, PIL; None where not asked for.
        grammar: V_Grammar by name, each in [0, 1]; None without an abstractor.
        counts: text blocks and pictures by name; None without an abstractor.
    """

    features: list[np.ndarray]
    overlays: list[Image.Image] | None
    grammar: list[dict[str, float]] | None
    counts: list[dict[str, int]] | None


class LayoutAnalysisPipeline(StandalonePipelineMixin, DiffusionPipeline):
    """Reads posters: text, pictures, colour roles, hierarchy; with an abstractor, the layout's grammar too.

    Args:
        encoder: a LayoutEncoderModel; without one there is `abstract` alone.
        abstractor: a GrammarAbstractorModel, or None.
    """

    _optional_components = ["encoder", "abstractor"]
    model_cpu_offload_seq = "encoder->abstractor"

    def __init__(self, encoder: ModelMixin | None = None, abstractor: ModelMixin | None = None):
        super().__init__()
        self.register_modules(encoder=encoder, abstractor=abstractor)

    @torch.no_grad()
    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        reading_size: int | None = None,
        overlays: bool = True,
        return_dict: bool = True,
    ) -> LayoutAnalysisOutput | tuple:
        """Read `images`, PIL pictures of any sizes.

        Args:
            reading_size: pixels of the shorter side at which a picture is read; None takes the size that the encoder
                was trained at. What is found is enlarged to the picture's own size.
            overlays: whether to draw them.

        Raises:
            ValueError: no pictures, something else than pictures, or no encoder to read them with.
        """
        pictures = self.check_inputs(images, reading_size)
        size = reading_size or self.encoder.config.sample_size
        read = [self._read(picture, size) for picture in pictures]
        features = [self._features(probabilities, picture.size) for probabilities, picture in zip(read, pictures)]
        drawn = [draw_overlay(p, f) for p, f in zip(pictures, features, strict=True)] if overlays else None
        grammar, counts = self._abstract(read)
        self.maybe_free_model_hooks()
        output = LayoutAnalysisOutput(features=features, overlays=drawn, grammar=grammar, counts=counts)
        return output if return_dict else output.to_tuple()

    def check_inputs(self, images: Any, reading_size: int | None) -> list[Image.Image]:
        """The pictures, upright and RGB; raises ValueError for what is none."""
        if self.encoder is None:
            raise ValueError("this pipeline has no encoder to read pictures with; `abstract` takes feature tensors")
        pictures = list(images) if isinstance(images, (list, tuple)) else [images]
        if not pictures:
            raise ValueError("`images` is empty; give at least one picture")
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                raise ValueError(f"`images` must be PIL pictures, but one is a {type(picture).__name__}")
        if reading_size is not None and reading_size < 16:
            raise ValueError(f"`reading_size` is {reading_size}; it must be at least 16 pixels")
        return [ImageOps.exif_transpose(picture).convert("RGB") for picture in pictures]

    def _read(self, picture: Image.Image, size: int) -> Tensor:
        """1 × C × h × w, the encoder's probabilities at the reading size."""
        scale = size / min(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
        pixels = pixel_channels(scaled).float() / 127.5 - 1
        return self.encoder(pixels[None].to(self._execution_device, self.encoder.dtype)).probabilities()

    @staticmethod
    def _features(probabilities: Tensor, size: tuple[int, int]) -> np.ndarray:
        """F_Tensor at `size` (width, height): probabilities are enlarged, and decided there, so edges stay smooth."""
        width, height = size
        found = probabilities.float().cpu()
        if found.shape[-2:] != (height, width):
            found = F.interpolate(found, size=(height, width), mode="bilinear")
        masks, roles, hierarchy = found[0, :2] > 0.5, found[0, 2:-1].argmax(0, keepdim=True), found[0, -1:]
        return torch.cat([masks.float(), roles.float(), hierarchy]).numpy()

    @torch.no_grad()
    def abstract(self, features: Sequence[np.ndarray]) -> tuple[list[dict[str, float]], list[dict[str, int]]]:
        """Grammar and counts of F_Tensors (each 4 × H × W, as in `LayoutAnalysisOutput.features`).

        Raises:
            ValueError: no abstractor, or an array of another shape.
        """
        if self.abstractor is None:
            raise ValueError("this pipeline has no abstractor; train one with training/train_abstractor.py")
        for array in features:
            if np.ndim(array) != 3 or len(array) != 4:
                raise ValueError(f"`features` must be 4 × H × W each, but one has the shape {np.shape(array)}")
        channels = [feature_channels(torch.as_tensor(array, dtype=torch.float32)[None]) for array in features]
        grammar, counts = self._abstract([c.to(self._execution_device) for c in channels])
        return grammar or [], counts or []

    def _abstract(self, read: list[Tensor]) -> tuple[list[dict[str, float]] | None, list[dict[str, int]] | None]:
        if self.abstractor is None:
            return None, None
        grammar, counts = [], []
        for probabilities in read:
            said = self.abstractor(probabilities.to(self.abstractor.dtype))
            grammar.append(dict(zip(GRAMMAR, said.grammar[0].tolist(), strict=True)))
            counts.append(dict(zip(COUNTS, said.counted()[0].tolist(), strict=True)))
        return grammar, counts


def feature_channels(features: Tensor, num_color_roles: int = len(COLOR_ROLES)) -> Tensor:
    """F_Tensors, B 4 H W, as the abstractor takes them: text, image, one channel per colour role, hierarchy."""
    roles = F.one_hot(features[:, 2].long(), num_color_roles).movedim(-1, 1).to(features)
    return torch.cat([features[:, :2], roles, features[:, 3:]], 1)
