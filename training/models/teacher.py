"""The teacher of a distillation: a trained latent diffusion model, which stays frozen and samples with guidance.

B batch, C latent channels, h w latent cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.common.checks import side_multiple
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from training.core.draws import Draws, mix
from training.core.stage import Batch
from training.data.images import DataConfig, ImageDataset, load_label_map
from training.data.labels import LabelMap
from training.data.source import column_values
from training.data.tokenization import MANY_UNKNOWN, CaptionTokens, report_on
from training.data.transforms import CHANNELS
from training.metrics.generators import native_size
from training.models.attention import attention_kernel
from training.models.conditioning import caption_and_class

CHECKED_CAPTIONS = 1000

Condition = Mapping[str, Tensor | None]
"""The arguments of a denoiser other than its input and the timestep, and `prior`: B C h w, or None."""


class Teacher:
    """A LatentDiffusionPipeline with rectified flow, frozen.

    Attributes:
        kind: name of its network in the pipeline: `unet` or `transformer`.
        recomputes: whether the student computes parts of its forward pass again, see `attention_kernel`.
    """

    def __init__(self, pipeline: Any, guidance_scale: float, recomputes: bool = False):
        self.recomputes = recomputes
        self.pipeline, self.guidance_scale = pipeline, guidance_scale
        self.kind = "unet" if pipeline.transformer is None else "transformer"
        self.num_train_timesteps = int(pipeline.scheduler.config.num_train_timesteps)
        self.modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        for module in self.modules:
            module.requires_grad_(False).eval()
        self.tokens = self._empty_ids = None
        if pipeline.tokenizer is not None:
            self.tokens = CaptionTokens(pipeline.tokenizer, pipeline.config.max_text_length, "max_length")
            self._empty_ids = self.tokens([""])["input_ids"]

    @property
    def denoiser(self) -> Any:
        return self.pipeline.denoiser

    @property
    def takes_labels(self) -> bool:
        return self.denoiser.config.num_class_embeds is not None

    @property
    def divisor(self) -> int:
        """Number of pixels of which the sides of images must be multiples."""
        return self.pipeline.vae_scale_factor * side_multiple(self.denoiser)

    @property
    def id2label(self) -> dict[int, str]:
        return {int(id_): name for id_, name in (self.pipeline.config.id2label or {}).items()}

    def check_images(self, path: str, config: DataConfig) -> None:
        """Raise UserError if the teacher generates other images than those of `config`: channels or size."""
        from pipelines.common.latents import image_channels_of

        channels = image_channels_of(self.pipeline.vae)
        if channels != CHANNELS[config.image_mode]:
            mode = next((mode for mode, number in CHANNELS.items() if number == channels), "rgb")
            raise UserError(
                f"--image_mode {config.image_mode}: --teacher {path} generates images with {channels} channels; use "
                f"--image_mode {mode}"
            )
        size = native_size(self.pipeline)
        if size is not None and config.resolution not in size:
            raise UserError(
                f"--resolution {config.resolution}: --teacher {path} was trained at {size[0]} x {size[1]} pixels; use "
                f"--resolution {size[0]}"
            )

    def label_map(self, path: str, config: DataConfig) -> LabelMap | None:
        """Return the classes of the data with the teacher's ids, or None for a teacher without classes.

        Raises:
            UserError: the data have other classes.
        """
        if not self.takes_labels:
            return None
        names = [self.id2label[id_] for id_ in sorted(self.id2label)]
        labels = load_label_map(config, names)
        if names and labels.names != names:
            raise UserError(
                f"--teacher {path} has the classes {', '.join(names[:8])}, but column '{config.label_column}' has "
                f"{', '.join(labels.names[:8])}; distil with the data that the teacher was trained on"
            )
        return labels

    def check_captions(self, path: str, data: ImageDataset) -> None:
        """Raise UserError if the teacher's tokenizer does not know many words of the captions."""
        if self.tokens is None or self.tokens.tokenizer.unk_token_id is None:
            return
        values = itertools.islice(column_values(data.dataset, data.config.caption_column), CHECKED_CAPTIONS)
        texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
        share = report_on(self.tokens.tokenizer, texts).unknown_share
        if share > MANY_UNKNOWN:
            raise UserError(
                f"--teacher {path} does not know {share:.0%} of the words in the captions, so it was trained on other "
                "data; distil with the data that the teacher was trained on"
            )

    @torch.no_grad()
    def condition(self, batch: Batch, *, dropped: bool = False) -> Condition:
        """Return the condition of each sample, or the empty one if `dropped`."""
        pipeline, index = self.pipeline, batch["index"]
        if self._empty_ids is not None:
            self._empty_ids = self._empty_ids.to(index.device)  # kept there: a copy per step would wait for it
        mask = torch.full_like(index, dropped, dtype=torch.bool)
        found = caption_and_class(self.denoiser, pipeline.text_encoder, self._empty_ids, batch, mask)
        prior = pipeline.caption_prior
        return {**found, "prior": None if prior is None else prior(found["encoder_hidden_states"])}

    def flow(self, denoiser: Any, x: Tensor, level: float | Tensor, condition: Condition) -> Tensor:
        """Return the flow that a network with the arguments of the teacher's predicts, in float32. B C h w.

        Args:
            level: a noise level, or one for each sample (B).
        """
        from pipelines.latent_diffusion import concat_condition

        levels = level if isinstance(level, Tensor) else torch.full((len(x),), level, device=x.device)
        arguments = {name: value for name, value in condition.items() if name != "prior"}
        model_input = concat_condition(x, condition["prior"])
        with attention_kernel(x[0, 0].numel(), gradient_checkpointing=self.recomputes):
            return denoiser(model_input, levels * self.num_train_timesteps, **arguments).sample.float()

    @torch.no_grad()
    def guided(self, x: Tensor, level: float, condition: Condition, empty: Condition | None) -> Tensor:
        """Return the flow at a noise level with guidance, or without it if `empty` is None. B C h w."""
        from pipelines.common.sampling import guided

        if empty is None:
            return self.flow(self.denoiser, x, level, condition)
        both = joined([empty, condition])
        return guided(self.flow(self.denoiser, torch.cat([x, x]), level, both), self.guidance_scale)

    @torch.no_grad()
    def finished(self, x: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """Return clean samples (B C h w) as the teacher's pipeline finishes them: see `restarted`."""
        from pipelines.common.sampling import restarted

        levels = self.denoiser.config.get("restart_levels") or ()
        seeds = [mix(draws.seed, "restart", draws.step, position) for position in draws.positions] if levels else []

        def flow(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.flow(self.denoiser, noisy, timestep / self.num_train_timesteps, condition)

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return restarted(x, levels, flow, self.num_train_timesteps, generators)


def joined(conditions: Sequence[Condition]) -> Condition:
    """Return the conditions of several batches as that of one batch."""
    joint: dict[str, Tensor | None] = {}
    for name in conditions[0]:
        parts = [part for condition in conditions if (part := condition[name]) is not None]
        joint[name] = torch.cat(parts) if parts else None
    return joint


def load_teacher(path: str, guidance_scale: float, recomputes: bool = False) -> Teacher:
    """Load the latent diffusion model at `path` (run, checkpoint, pipeline folder or Hub id) and freeze it.

    Raises:
        UserError: the path has no such model, or one that cannot be distilled.
    """
    from pipelines.common.schedulers import FLOW
    from pipelines.latent_diffusion import LatentDiffusionPipeline

    pipeline = load_pipeline(path)
    if type(pipeline) is not LatentDiffusionPipeline:
        raise UserError(
            f"--teacher {path} is a {type(pipeline).__name__}, which cannot be distilled; give a run of "
            "train_latent_diffusion.py"
        )
    if distilled := pipeline.config.get("distilled"):
        raise UserError(
            f"--teacher {path} was distilled to {distilled['num_inference_steps']} steps already; give the model that "
            "it was distilled from, and begin with its weights by --init_from if you like"
        )
    if pipeline.config.prediction_type != FLOW:
        raise UserError(
            f"--teacher {path} predicts {pipeline.config.prediction_type}, and only rectified flow can be distilled; "
            "give a model that was trained with --prediction_type flow_prediction"
        )
    return Teacher(pipeline, guidance_scale, recomputes)
