"""Analyze posters: predict the feature tensor and the design grammar of a poster, and draw an overlay of the features.

Shapes: H W pixels of a poster at its original size.

F_Tensor is the feature tensor of a poster: text mask, image mask, colour roles and visual hierarchy, 4 × H × W.
V_Grammar is its vector of design grammar.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from .common.checks import check_positive_integers
from .common.layout_pictures import draw_overlay
from .common.pixels import pixel_channels, to_rgb
from .common.poster_domain import COLOR_ROLES, COUNTS, GRAMMAR
from .common.standalone import StandalonePipelineMixin


@dataclass
class LayoutAnalysisOutput(BaseOutput):
    """Output of `LayoutAnalysisPipeline`, with one entry for each poster.

    Args:
        features (`list[np.ndarray]`): Feature tensors, float32, 4 × H × W: text mask and image mask in {0, 1}, colour
            role as class id, visual hierarchy in [0, 1].
        overlays (`list[PIL.Image.Image]`): Posters with their text and pictures highlighted, or `None` if they were not
            requested.
        grammar (`list[dict[str, float]]`): Design grammar, each value in [0, 1] by its name, or `None` without an
            abstractor.
        counts (`list[dict[str, int]]`): Numbers of text blocks and pictures by name, or `None` without an abstractor.
    """

    features: list[np.ndarray]
    overlays: list[Image.Image] | None
    grammar: list[dict[str, float]] | None
    counts: list[dict[str, int]] | None


class LayoutAnalysisPipeline(StandalonePipelineMixin, DiffusionPipeline):
    """Pipeline that reads text, pictures, colour roles and visual hierarchy of posters, and optionally their grammar.

    Args:
        encoder (`LayoutEncoderModel`, *optional*): Predicts features from posters. Without it only `abstract` works.
        abstractor (`GrammarAbstractorModel`, *optional*): Predicts the design grammar from features.
    """

    _optional_components = ["encoder", "abstractor"]
    model_cpu_offload_seq = "encoder->abstractor"

    def __init__(self, encoder: Optional[ModelMixin] = None, abstractor: Optional[ModelMixin] = None):
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
        """Predict the features of posters and, with an abstractor, their design grammar.

        Args:
            images (`PIL.Image.Image` or `list[PIL.Image.Image]`): The posters, of any size.
            reading_size (`int`, *optional*): Size in pixels that the shorter side of a poster is resized to before it
                is encoded. Defaults to the training size. The predictions are resized back to the size of the poster.
            overlays (`bool`, defaults to `True`): Whether to draw overlays.
            return_dict (`bool`, defaults to `True`): Whether to return a `LayoutAnalysisOutput` instead of a tuple.

        Returns:
            `LayoutAnalysisOutput` or `tuple`: The predictions; a tuple of those that are not `None` if `return_dict` is
            `False`.

        Raises:
            ValueError: If an argument is invalid, or the pipeline has no encoder.
        """
        posters = self.check_inputs(images, reading_size)
        size = reading_size or self.encoder.config.sample_size
        predictions = [self._read(poster, size) for poster in posters]
        features = [self._features(own, poster.size) for own, poster in zip(predictions, posters)]
        drawn = [draw_overlay(p, f) for p, f in zip(posters, features, strict=True)] if overlays else None
        grammar, counts = self._abstract(predictions)
        self.maybe_free_model_hooks()
        output = LayoutAnalysisOutput(features=features, overlays=drawn, grammar=grammar, counts=counts)
        return output if return_dict else output.to_tuple()

    def check_inputs(self, images: Any, reading_size: int | None) -> list[Image.Image]:
        """Return the posters upright, in RGB, as training reads them.

        Raises:
            ValueError: If an argument is invalid; the message quotes it.
        """
        if self.encoder is None:
            raise ValueError("this pipeline has no encoder to read images; pass feature tensors to `abstract` instead")
        posters = list(images) if isinstance(images, (list, tuple)) else [images]
        if not posters:
            raise ValueError("`images` is empty; pass at least one image")
        for poster in posters:
            if not isinstance(poster, Image.Image):
                raise ValueError(f"`images` must be PIL images, but one is a {type(poster).__name__}")
        if reading_size is not None:
            check_positive_integers(reading_size=reading_size)
        if reading_size is not None and reading_size < 16:
            raise ValueError(f"`reading_size` is {reading_size}; it must be at least 16 pixels")
        return [to_rgb(poster) for poster in posters]

    def _read(self, poster: Image.Image, size: int) -> Tensor:
        """Predict the encoder's probabilities at the reading size, 1 × C × h × w."""
        scale = size / min(poster.size)
        width, height = (max(1, round(side * scale)) for side in poster.size)
        scaled = poster.resize((width, height), Image.Resampling.LANCZOS)
        pixels = pixel_channels(scaled).float() / 127.5 - 1
        return self.encoder(pixels[None].to(self._execution_device, self.encoder.dtype)).probabilities()

    @staticmethod
    def _features(probabilities: Tensor, size: tuple[int, int]) -> np.ndarray:
        """Convert probabilities to F_Tensor at `size` (width, height).

        Probabilities are resized before they are thresholded, because resized masks would have jagged edges.
        """
        width, height = size
        resized = probabilities.float().cpu()
        if resized.shape[-2:] != (height, width):
            resized = F.interpolate(resized, size=(height, width), mode="bilinear")
        masks, roles, hierarchy = resized[0, :2] > 0.5, resized[0, 2:-1].argmax(0, keepdim=True), resized[0, -1:]
        return torch.cat([masks.float(), roles.float(), hierarchy]).numpy()

    @torch.no_grad()
    def abstract(self, features: Sequence[np.ndarray]) -> tuple[list[dict[str, float]], list[dict[str, int]]]:
        """Predict the design grammar and the numbers of text blocks and pictures from features.

        Args:
            features (`list[np.ndarray]`): Feature tensors, each 4 × H × W, as in `LayoutAnalysisOutput.features`.

        Returns:
            `tuple[list[dict[str, float]], list[dict[str, int]]]`: Grammar and counts, each by name for each poster.

        Raises:
            ValueError: If the pipeline has no abstractor, or an array has another shape.
        """
        if self.abstractor is None:
            raise ValueError("this pipeline has no abstractor; train one with training/train_abstractor.py")
        if not isinstance(features, (list, tuple)):
            raise ValueError(f"`features` must be a list of arrays, but is a {type(features).__name__}")
        for array in features:
            if np.ndim(array) != 3 or len(array) != 4:
                raise ValueError(f"`features` must be of shape 4 × H × W, but one has shape {np.shape(array)}")
        channels = [feature_channels(torch.as_tensor(array, dtype=torch.float32)[None]) for array in features]
        grammar, counts = self._abstract([c.to(self._execution_device) for c in channels])
        return grammar or [], counts or []

    def _abstract(self, predictions: list[Tensor]) -> tuple[list[dict[str, float]] | None, list[dict[str, int]] | None]:
        if self.abstractor is None:
            return None, None
        grammar, counts = [], []
        for probabilities in predictions:
            predicted = self.abstractor(probabilities.to(self.abstractor.dtype))
            grammar.append(dict(zip(GRAMMAR, predicted.grammar[0].tolist(), strict=True)))
            counts.append(dict(zip(COUNTS, predicted.counted()[0].tolist(), strict=True)))
        return grammar, counts


def feature_channels(features: Tensor, num_color_roles: int = len(COLOR_ROLES)) -> Tensor:
    """Convert F_Tensors (B 4 H W) to the abstractor's input: text, image, one channel per colour role, hierarchy."""
    roles = F.one_hot(features[:, 2].long(), num_color_roles).movedim(-1, 1).to(features)
    return torch.cat([features[:, :2], roles, features[:, 3:]], 1)
