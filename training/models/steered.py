"""The frozen base model that a ControlNet is trained on: latent diffusion or the poster decoder, with one interface.

A ControlNet's training needs few things from its base model: a dataset with the base model's condition, the U-Net's
input, the condition as the base model was trained with it, and a pipeline for previews. Each base model's class below
provides them, so that train_controlnet.py does not depend on the kind of base model.

B batch, C channels, h w cells of the U-Net's input (latents or pixels).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.common.checks import side_multiple
from pipelines.tools.cli import UserError
from training.core.draws import Draws
from training.core.stage import Batch
from training.data.briefs import BriefedPosters
from training.data.images import DataConfig, ImageDataset, load_label_map
from training.data.tokenization import CaptionTokens
from training.models.batch_latents import batch_latents
from training.models.conditioning import caption_and_class, pipeline_conditions
from training.objectives.diffusion import Diffusion, ObjectiveConfig, diffusion_of_pipeline


class ControlBase(ABC):
    """A frozen base model: the data, the U-Net's input, the condition and the pipeline for training a ControlNet."""

    downsampling: int
    """Pixels per cell of the U-Net's input, along a side"""
    takes_aspect_buckets = True
    """Whether its images may be other than squares"""

    def __init__(self, pipeline: Any):
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        # No parameter of the base is trained, but gradients must still pass through its U-Net: the ControlNet's
        # features enter there. Hence no `torch.no_grad` around the U-Net.
        for module in self.modules:
            module.requires_grad_(False).eval()

    def objective(self, config: ObjectiveConfig) -> Diffusion:
        """Return the objective in `config` on the noise schedule of the base model."""
        return diffusion_of_pipeline(self.pipeline, config)

    @abstractmethod
    def dataset(self, rows: Any, config: DataConfig, control: Any, *, augment: bool) -> ImageDataset:
        """Return a dataset of images with their control and the base model's condition.

        Raises:
            UserError: the data does not suit the base model.
        """

    @property
    def divisor(self) -> int:
        """Number of pixels of which the sides of images must be multiples."""
        return self.downsampling * side_multiple(self.unet)

    @abstractmethod
    def clean(self, batch: Batch, draws: Draws) -> Tensor:
        """Return the clean samples x_0, B C h w."""

    @abstractmethod
    def condition(self, batch: Batch, dropped: Tensor) -> dict[str, Any]:
        """Return the U-Net's arguments other than input and timesteps.

        Args:
            dropped: B, bool; True for samples whose condition is dropped.
        """

    def model_input(self, noisy: Tensor, condition: dict[str, Any]) -> Tensor:
        """Return the U-Net's input for noisy samples (B C h w)."""
        return noisy

    @abstractmethod
    def controlled(self, controlnet: Any) -> Any:
        """Return a pipeline of the base model and `controlnet`."""

    @abstractmethod
    def prompts(self, data: Any, batch: Batch, rows: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
        """Return the pipeline's arguments for these rows of a batch of `data`, and the captions of their images."""


class LatentBase(ControlBase):
    """A LatentDiffusionPipeline as base model."""

    def __init__(self, pipeline: Any, resolution: int):
        from pipelines.common.latents import image_channels_of, latent_shape

        super().__init__(pipeline)
        self.downsampling = pipeline.vae_scale_factor
        if (channels := image_channels_of(pipeline.vae)) != 3:
            raise UserError(
                f"the base model generates images with {channels} channels, and a ControlNet steers only models of RGB "
                "images; choose one that was trained with --image_mode rgb"
            )
        try:
            latent_shape(pipeline.vae, resolution, resolution)  # called for its check alone
        except ValueError as error:
            raise UserError(f"--resolution {resolution} does not suit the base model's VAE: {error}") from None
        self.caption_tokens = self.empty_ids = None
        if pipeline.tokenizer is not None:
            self.caption_tokens = CaptionTokens(pipeline.tokenizer, pipeline.config.max_text_length, "max_length")
            self.empty_ids = self.caption_tokens([""])["input_ids"]

    def dataset(self, rows: Any, config: DataConfig, control: Any, *, augment: bool) -> ImageDataset:
        names = [self.pipeline.config.id2label[key] for key in sorted(self.pipeline.config.id2label or {}, key=int)]
        labels = load_label_map(config, names) if self.unet.config.num_class_embeds else None
        # A class id is a position in these names, so other names or another order would be other classes.
        if labels is not None and names and labels.names != names:
            raise UserError(
                f"the base model has the classes {', '.join(names[:8])}, but column '{config.label_column}' has "
                f"{', '.join(labels.names[:8])}; train on data with the base model's classes"
            )
        return ImageDataset(
            rows,
            config,
            captions=self.caption_tokens is not None,
            caption_tokens=self.caption_tokens,
            labels=labels is not None,
            label_map=labels,
            control=control,
            augment=augment,
        )

    def clean(self, batch: Batch, draws: Draws) -> Tensor:
        return batch_latents(self.pipeline.vae, batch, draws)

    def condition(self, batch: Batch, dropped: Tensor) -> dict[str, Any]:
        if self.empty_ids is not None:
            self.empty_ids = self.empty_ids.to(dropped.device)  # kept there: a copy per step would wait for it
        # The frozen text encoder lies before the ControlNet, so no gradient has to pass through it.
        with torch.no_grad():
            return caption_and_class(self.unet, self.pipeline.text_encoder, self.empty_ids, batch, dropped)

    def model_input(self, noisy: Tensor, condition: dict[str, Any]) -> Tensor:
        from pipelines.latent_diffusion import concat_condition

        # The U-Net of a base model with a caption prior takes the prior's latents as further input channels.
        prior = self.pipeline.caption_prior
        return noisy if prior is None else concat_condition(noisy, prior(condition["encoder_hidden_states"]))

    def controlled(self, controlnet: Any) -> Any:
        from pipelines.fusion_controlnet_pipeline import FusionControlNetPipeline

        # The base may itself be a pipeline with a ControlNet, which the new one replaces.
        parts = {name: part for name, part in self.pipeline.components.items() if name != "controlnet"}
        config = {name: self.pipeline.config[name] for name in ("prediction_type", "id2label", "max_text_length")}
        return FusionControlNetPipeline(**parts, **config, controlnet=controlnet)

    def prompts(self, data: Any, batch: Batch, rows: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
        texts = [batch["caption"][row] for row in rows] if self.caption_tokens is not None else None
        labels = [int(batch["label"][row]) for row in rows] if self.unet.config.num_class_embeds else None
        id2label = {int(id_): name for id_, name in (self.pipeline.config.id2label or {}).items()}
        conditions, captions = pipeline_conditions(len(rows), texts, labels, id2label)
        # Without text and classes, the number of images is the number of controls.
        return ({} if texts is labels is None else conditions), captions


class PosterBase(ControlBase):
    """A PosterDecoderPipeline as base model, which works on pixels."""

    downsampling = 1
    takes_aspect_buckets = False

    def __init__(self, pipeline: Any, resolution: int):
        super().__init__(pipeline)
        try:
            pipeline._size(resolution, resolution)  # called for its check alone
        except ValueError as error:
            raise UserError(f"--resolution {resolution} does not suit the base model: {error}") from None

    def dataset(self, rows: Any, config: DataConfig, control: Any, *, augment: bool) -> ImageDataset:
        return BriefedPosters(rows, config, control=control, augment=augment)

    def clean(self, batch: Batch, draws: Draws) -> Tensor:
        return batch["pixel_values"]

    def condition(self, batch: Batch, dropped: Tensor) -> dict[str, Any]:
        # The unconditional brief is the one in which every field is absent, as in the decoder's own training.
        brief = {
            name: value & ~dropped[:, None] if name.endswith("_present") else value
            for name, value in batch["brief"].items()
        }
        with torch.no_grad():
            tokens, whole = self.pipeline.brief_encoder(**brief)
        return {"encoder_hidden_states": tokens, "class_labels": whole}

    def controlled(self, controlnet: Any) -> Any:
        from pipelines.poster_controlnet_pipeline import PosterControlNetPipeline

        parts = {name: part for name, part in self.pipeline.components.items() if name != "controlnet"}
        return PosterControlNetPipeline(
            **parts, prediction_type=self.pipeline.config.prediction_type, controlnet=controlnet
        )

    def prompts(self, data: Any, batch: Batch, rows: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
        briefs = [data.brief(int(batch["index"][row])) for row in rows]
        return {"briefs": briefs}, [brief.describe() for brief in briefs]


def load_base(path: str, resolution: int) -> ControlBase:
    """Load the base model at `path` (run, checkpoint, pipeline folder or Hub id) and freeze it.

    Raises:
        UserError: the path has no pipeline that a ControlNet can steer, or the resolution does not suit it.
    """
    from pipelines.latent_diffusion import LatentDiffusionPipeline
    from pipelines.poster_decoder import PosterDecoderPipeline
    from pipelines.tools.loading import load_pipeline

    pipeline = load_pipeline(path)
    for pipeline_class, base in ((LatentDiffusionPipeline, LatentBase), (PosterDecoderPipeline, PosterBase)):
        if isinstance(pipeline, pipeline_class):
            if pipeline.unet is None:
                raise UserError(
                    f"--base_model {path} denoises with a transformer, but a ControlNet steers a U-Net; give a base "
                    "model that was trained with --denoiser unet"
                )
            if distilled := pipeline.config.get("distilled"):
                raise UserError(
                    f"--base_model {path} was distilled to {distilled['num_inference_steps']} steps, and knows no "
                    "other noise levels, which a ControlNet needs; give the model that it was distilled from"
                )
            return base(pipeline, resolution)
    raise UserError(
        f"--base_model {path} is a {type(pipeline).__name__}, which a ControlNet cannot steer; give a run of "
        "train_latent_diffusion.py or train_decoder.py"
    )
