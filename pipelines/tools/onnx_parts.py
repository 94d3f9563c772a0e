"""The networks of a pipeline as parts to export: each with its inputs by name, its outputs, and what may vary in size.

Shapes: B batch, C channels, h w latent cells, H W pixels, L tokens, D width of the text, E width of a brief.

A part takes and returns float32 (and int64 or bool for ids and masks) for weights of any precision, so that
a caller does not have to know it. An axis that may vary is a name and a multiple: sides of an image vary in multiples
of what the network downsamples by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import side_multiple
from ..common.latents import downsampling_factor, image_channels_of, latent_channels
from ..models.fusion_controlnet import as_nets, steering

Axes = Mapping[int, tuple[str, int]]
"""axis -> (name of the dimension, multiple)"""
TOKENS_IN_EXAMPLE = 6


@dataclass(frozen=True)
class Part:
    """A network to export.

    Args:
        name: name of the file, without its suffix.
        network: takes tensors by the names of its inputs; returns a tensor, or a tuple of tensors.
        example: (batch size, units added to each size) → inputs by name.
        outputs: names of the outputs.
        axes: the axes of each input that may vary, except the batch, which is axis 0.
        without_batch: inputs of which axis 0 is something else, and does not vary.
        largest: the largest size of a dimension, by its name, if the network has a limit.
    """

    name: str
    network: nn.Module
    example: Callable[[int, int], dict[str, Tensor]]
    outputs: tuple[str, ...]
    axes: Mapping[str, Axes] = field(default_factory=dict)
    without_batch: tuple[str, ...] = ()
    largest: Mapping[str, int] = field(default_factory=dict)


def parts_of(pipeline: Any) -> list[Part]:
    """Return the parts of one of Halftone's pipelines. A `PixelAutoencoder` computes nothing, and is not among them."""
    parts: list[Part] = []
    components = pipeline.components
    for name, make in _MAKERS.items():
        if components.get(name) is not None:
            parts += make(pipeline)
    return parts


class _Network(nn.Module):
    """A network whose floating-point inputs are cast to the dtype of its weights, and its outputs to float32."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.weight_dtype = next((p.dtype for p in network.parameters()), torch.float32)

    def cast(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or not x.is_floating_point() else x.to(self.weight_dtype)


class _Denoiser(_Network):
    """A U-Net or a transformer; timesteps stay float32, because a half has not enough digits for them."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        return self.network(
            self.cast(sample),
            timestep,
            encoder_hidden_states=self.cast(encoder_hidden_states),
            class_labels=self.cast(class_labels),
            return_dict=False,
        )[0].float()


class _SteeredDenoiser(_Denoiser):
    """A U-Net and its ControlNets as one network, because fusion reads the features of the U-Net."""

    def __init__(self, network: nn.Module, controlnet: nn.Module):
        super().__init__(network)
        self.controlnet = controlnet

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        controls: list[Tensor],
        conditioning_scales: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        cast = [control.to(self.weight_dtype) for control in controls]
        with steering(self.network, as_nets(self.controlnet), cast, lambda net, _: _scale(conditioning_scales, net)):
            return super().forward(sample, timestep, encoder_hidden_states, class_labels)


def _scale(conditioning_scales: Tensor, net: int) -> Tensor:
    return conditioning_scales[net]


class _Encoder(_Network):
    """The encoder of a VAE: moments of the posterior, or latents where the encoder is deterministic."""

    def forward(self, images: Tensor) -> Any:
        encoded = self.network.encode(self.cast(images))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean.float(), encoded.latent_dist.logvar.float()
        return next(getattr(encoded, name) for name in ("latents", "latent") if hasattr(encoded, name)).float()


class _Method(_Network):
    """One method of a network with several, from one tensor to one tensor."""

    def __init__(self, network: nn.Module, method: str):
        super().__init__(network)
        self.method = method

    def forward(self, z: Tensor) -> Tensor:
        result = getattr(self.network, self.method)(self.cast(z))
        return getattr(result, "sample", result).float()


class _TextEncoder(_Network):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.network(input_ids=input_ids).last_hidden_state.float()


class _CaptionPrior(_Network):
    """Latents are resized to the size of `sample` also where that changes nothing, so that one graph has all sizes."""

    def forward(self, encoder_hidden_states: Tensor, sample: Tensor) -> Tensor:
        expected = self.network(self.cast(encoder_hidden_states)).float()
        return nn.functional.interpolate(expected, size=sample.shape[-2:], mode="bilinear")


class _BriefEncoder(_Network):
    def forward(
        self,
        style: Tensor,
        numbers: Tensor,
        counts: Tensor,
        palette: Tensor,
        style_present: Tensor,
        numbers_present: Tensor,
        counts_present: Tensor,
        palette_present: Tensor,
    ) -> tuple[Tensor, ...]:
        present = (style_present, numbers_present, counts_present, palette_present)
        return tuple(part.float() for part in self.network(style, numbers, counts, palette, *present))


class _LayoutEncoder(_Network):
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        maps = self.network(self.cast(pixel_values))
        return tuple(maps[name].float() for name in LAYOUT_MAPS)


class _Abstractor(_Network):
    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        predicted = self.network(self.cast(features))
        return (predicted.grammar.float(), *(logits.float() for logits in predicted.counts))


class _ImageEncoder(_Network):
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.float() for part in self.network.encode_image(self.cast(pixel_values)))


class _CaptionEncoder(_Network):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        # With `has_padding`, no value of the mask is read, which a graph cannot do.
        posterior = self.network.encode_caption(input_ids, attention_mask, has_padding=True)
        return tuple(part.float() for part in posterior)


class _CaptionDecoder(_Network):
    def forward(self, latents: Tensor, input_ids: Tensor) -> Tensor:
        return self.network.caption_logits(self.cast(latents), input_ids).float()


class _LatentPrior(_Network):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.network(self.cast(sample), timestep).float()


LAYOUT_MAPS = ("text_mask", "image_mask", "color_role", "hierarchy")


def denoiser_part(pipeline: Any) -> list[Part]:
    """Return the U-Net or transformer of a pipeline that generates images."""
    network, wrapper = pipeline.denoiser, _Denoiser(pipeline.denoiser)
    name = "unet" if getattr(pipeline, "transformer", None) is None else "transformer"
    return [
        Part(name, wrapper, _denoiser_example(pipeline), ("prediction",), {"sample": _sides(side_multiple(network))})
    ]


def _sides(multiple: int = 1) -> Axes:
    return {2: ("height", multiple), 3: ("width", multiple)}


def _denoiser_example(pipeline: Any) -> Callable[[int, int], dict[str, Tensor]]:
    network = pipeline.denoiser
    config = network.config
    step = side_multiple(network)

    def example(batch: int, units: int) -> dict[str, Tensor]:
        height, width = (side + units * step for side in trained_cells(network))
        inputs = {
            "sample": torch.randn(batch, config.in_channels, height, width),
            "timestep": torch.linspace(900, 300, batch),
        }
        if hasattr(pipeline, "brief_encoder"):
            encoder = pipeline.brief_encoder
            inputs["encoder_hidden_states"] = torch.randn(batch, encoder.num_tokens, encoder.config.token_width)
            inputs["class_labels"] = torch.randn(batch, encoder.config.global_width)
            return inputs
        if pipeline._takes_text:
            length = pipeline.config.max_text_length or TOKENS_IN_EXAMPLE
            inputs["encoder_hidden_states"] = torch.randn(batch, length, config.cross_attention_dim)
        if config.num_class_embeds is not None:
            inputs["class_labels"] = torch.arange(batch) % config.num_class_embeds
        return inputs

    return example


def trained_cells(network: Any) -> tuple[int, int]:
    """Return height and width of the inputs that a network was trained at; 32 where its config does not say."""
    size = network.config.sample_size or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def steered_part(pipeline: Any) -> list[Part]:
    """Return the U-Net with its ControlNets."""
    nets, network = as_nets(pipeline.controlnet), pipeline.unet
    without = _denoiser_example(pipeline)

    def example(batch: int, units: int) -> dict[str, Any]:
        given = without(batch, units)
        height, width = given["sample"].shape[-2:]
        sizes = [(batch, n.config.conditioning_channels, height * n.downsampling, width * n.downsampling) for n in nets]
        # In the order of the arguments, which is the order of the inputs of the graph.
        inputs: dict[str, Any] = {name: given.pop(name) for name in ("sample", "timestep")}
        inputs["controls"] = [torch.rand(size) for size in sizes]
        inputs["conditioning_scales"] = torch.linspace(1.0, 0.5, len(nets))
        inputs |= given
        return inputs

    step = side_multiple(network)
    axes = {"sample": _sides(step), **{f"controls_{i}": _sides(step * n.downsampling) for i, n in enumerate(nets)}}
    wrapper = _SteeredDenoiser(network, pipeline.controlnet)
    return [Part("steered_unet", wrapper, example, ("prediction",), axes, ("conditioning_scales",))]


def vae_parts(pipeline: Any) -> list[Part]:
    """Return encoder and decoder of an autoencoder, and its heads if it has any."""
    vae, factor = pipeline.vae, downsampling_factor(pipeline.vae)
    if type(vae).__name__ == "PixelAutoencoder":
        return []
    denoiser = getattr(pipeline, "denoiser", None)
    side_of_training = max(1, int(vae.config.get("sample_size") or 32) // factor)
    cells = (side_of_training, side_of_training) if denoiser is None else trained_cells(denoiser)

    def latents(batch: int, units: int) -> dict[str, Tensor]:
        return {"z": torch.randn(batch, latent_channels(vae), cells[0] + units, cells[1] + units)}

    def images(batch: int, units: int) -> dict[str, Tensor]:
        sides = ((side + units) * factor for side in cells)
        return {"images": torch.rand(batch, image_channels_of(vae), *sides) * 2 - 1}

    encoder = _Encoder(vae)
    with torch.no_grad():
        deterministic = isinstance(encoder(**images(1, 0)), Tensor)
    outputs = ("latents",) if deterministic else ("mean", "logvar")
    parts = [
        Part("vae_encoder", encoder, images, outputs, {"images": _sides(factor)}),
        Part("vae_decoder", _Method(vae, "decode"), latents, ("images",), {"z": _sides()}),
    ]
    if vae.config.get("num_mask_classes"):
        parts.append(Part("vae_segmentation", _Method(vae, "segment"), latents, ("mask_logits",), {"z": _sides()}))
    if vae.config.get("num_classes"):
        parts.append(Part("vae_classification", _Method(vae, "classify"), latents, ("logits",), {"z": _sides()}))
    return parts


def text_encoder_part(pipeline: Any) -> list[Part]:
    """Return the text encoder, for captions that are padded to the length of training."""
    encoder, length = pipeline.text_encoder, pipeline.config.max_text_length

    def example(batch: int, units: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(encoder.config.vocab_size, (batch, length))}

    return [Part("text_encoder", _TextEncoder(encoder), example, ("last_hidden_state",))]


def caption_prior_part(pipeline: Any) -> list[Part]:
    """Return the caption prior, with the size of a sample to which its prediction is resized."""
    config = pipeline.caption_prior.config

    def example(batch: int, units: int) -> dict[str, Tensor]:
        text = torch.randn(batch, pipeline.config.max_text_length, config.text_width)
        sides = (config.latent_height + units, config.latent_width + units)
        return {"encoder_hidden_states": text, "sample": torch.zeros(batch, config.latent_channels, *sides)}

    return [Part("caption_prior", _CaptionPrior(pipeline.caption_prior), example, ("expected",), {"sample": _sides()})]


def brief_encoder_part(pipeline: Any) -> list[Part]:
    """Return the encoder of design briefs."""
    from ..common.design_brief import DesignBrief, brief_tensors

    def example(batch: int, units: int) -> dict[str, Tensor]:
        return dict(brief_tensors([DesignBrief.random(seed) for seed in range(batch)], "cpu"))

    outputs = ("tokens", "global_vector")
    return [Part("brief_encoder", _BriefEncoder(pipeline.brief_encoder), example, outputs)]


def layout_encoder_part(pipeline: Any) -> list[Part]:
    """Return the layout encoder, whose sides are multiples of its `divisor` here: a graph does not pad."""
    encoder = pipeline.encoder

    def example(batch: int, units: int) -> dict[str, Tensor]:
        side = encoder.config.sample_size // encoder.divisor * encoder.divisor + units * encoder.divisor
        return {"pixel_values": torch.rand(batch, 3, side, side) * 2 - 1}

    return [Part("encoder", _LayoutEncoder(encoder), example, LAYOUT_MAPS, {"pixel_values": _sides(encoder.divisor)})]


def abstractor_part(pipeline: Any) -> list[Part]:
    """Return the grammar abstractor, for features of the size that it works at."""
    config = pipeline.abstractor.config

    def example(batch: int, units: int) -> dict[str, Tensor]:
        return {"features": torch.rand(batch, config.in_channels, config.sample_size, config.sample_size)}

    outputs = ("grammar", *(f"counts_{i}" for i in range(len(config.largest_counts))))
    return [Part("abstractor", _Abstractor(pipeline.abstractor), example, outputs)]


def image_caption_parts(pipeline: Any) -> list[Part]:
    """Return the two encoders and two decoders of a joint image–caption model."""
    model = pipeline.model
    config = model.config

    def images(batch: int, units: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.rand(batch, 3, config.sample_size, config.sample_size) * 2 - 1}

    def ids(batch: int, units: int) -> dict[str, Tensor]:
        length = min(TOKENS_IN_EXAMPLE + units, config.max_length)
        return {"input_ids": torch.randint(config.vocab_size, (batch, length))}

    def captions(batch: int, units: int) -> dict[str, Tensor]:
        tokens = ids(batch, units)["input_ids"]
        kept = torch.arange(batch)[:, None] % 2  # the last token of every second caption is padding
        mask = torch.ones_like(tokens)
        mask[:, -1:] -= kept
        return {"input_ids": tokens, "attention_mask": mask}

    def latents(batch: int, units: int) -> dict[str, Tensor]:
        return {"latents": torch.randn(batch, config.latent_size)}

    moments, length = ("mean", "logvar"), {1: ("length", 1)}
    text_axes, most = {"input_ids": length, "attention_mask": length}, {"length": config.max_length}
    return [
        Part("image_encoder", _ImageEncoder(model), images, moments),
        Part("image_decoder", _ImageDecoder(model), latents, ("images",)),
        Part("caption_encoder", _CaptionEncoder(model), captions, moments, text_axes, largest=most),
        Part(
            "caption_decoder",
            _CaptionDecoder(model),
            lambda batch, units: {**latents(batch, units), **ids(batch, units)},
            ("logits",),
            {"input_ids": length},
            largest=most,
        ),
    ]


class _ImageDecoder(_Network):
    def forward(self, latents: Tensor) -> Tensor:
        return self.network.decode_image(self.cast(latents)).float()


def latent_prior_part(pipeline: Any) -> list[Part]:
    """Return the prior over latent vectors of a joint image–caption model."""
    prior = pipeline.prior

    def example(batch: int, units: int) -> dict[str, Tensor]:
        return {"sample": torch.randn(batch, prior.config.latent_size), "timestep": torch.linspace(900, 300, batch)}

    return [Part("prior", _LatentPrior(prior), example, ("velocity",))]


# component of a pipeline -> function that makes its parts
_MAKERS: dict[str, Callable[[Any], list[Part]]] = {
    "text_encoder": text_encoder_part,
    "caption_prior": caption_prior_part,
    "brief_encoder": brief_encoder_part,
    "unet": denoiser_part,
    "transformer": denoiser_part,
    "controlnet": steered_part,
    "vae": vae_parts,
    "encoder": layout_encoder_part,
    "abstractor": abstractor_part,
    "model": image_caption_parts,
    "prior": latent_prior_part,
}
