"""Train the poster decoder from scratch: design brief → poster, by diffusion in pixel space.

    accelerate launch training/train_decoder.py                           # 64 px, posters made for you
    accelerate launch training/train_decoder.py --config configs/experiments/posters/decoder.yaml
    accelerate launch training/train_decoder.py --dataset_name data/posters_128 --resolution 128 --extra_epochs 2

Typed again, a command goes on where the run stood.
B batch, R resolution, L fields of a brief (tokens), D token width, E width of the global vector.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipelines.tools.cli import UserError, entry_point
from training.core.batches import fetch
from training.core.checks import check_at_least, check_deepest_feature_map
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.run_config import RunConfig, option
from training.core.stage import Batch, Phase, Stage
from training.data.briefs import BriefedPosters, drop_fields
from training.data.checks import require_clean
from training.data.images import DataConfig, load_split, validate_data_config
from training.engine.loop import train
from training.engine.weights import load_initial_weights
from training.metrics.images import to_pil
from training.models.attention import attention_kernel
from training.models.unet import PixelUNetConfig, build_pixel_unet, validate_pixel_unet_config
from training.objectives.diffusion import Diffusion, DiffusionConfig, validate_diffusion_config
from training.run.folder import has_checkpoint

logger = logging.getLogger("halftone")

PRESET = "configs/experiments/posters/decoder_64.yaml"


@dataclass
class BriefEncoderConfig:
    """The brief's encoder; names are those of DesignBriefEncoder."""

    token_width: int = 256
    """D, of the tokens that attention looks at"""
    global_width: int = 512
    """E, of the vector that joins the time embedding"""


@dataclass
class Config(DiffusionConfig, RunConfig, DataConfig):
    """Flags of train_decoder.py."""

    output_dir: str = option("runs/posters/decoder", on_resume="free")
    """The run folder"""
    model: PixelUNetConfig = field(default_factory=PixelUNetConfig, metadata={"on_resume": "error"})
    """The U-Net"""
    brief_encoder: BriefEncoderConfig = field(default_factory=BriefEncoderConfig, metadata={"on_resume": "error"})
    """The brief's encoder, trained jointly"""
    field_dropout: float = option(0.1)
    """Share of a brief's fields that training leaves out, on average: few or none of most briefs, most of some"""
    init_from: str | None = option(None)
    """Start from the weights of a run, checkpoint or pipeline; steps and optimizer start anew"""
    preview_guidance_scale: float = option(2.0, on_resume="free")
    """Guidance of the previews"""
    preview_inference_steps: int = option(25, on_resume="free")
    """Sampling steps of the previews"""
    num_previews: int = option(8, on_resume="free")
    """Posters in a preview: the first briefs of the validation data"""

    def validate(self) -> None:
        super().validate()
        validate_data_config(self)
        validate_diffusion_config(self)
        levels = len(self.model.block_out_channels)
        check_deepest_feature_map(self.resolution, 1, max(levels, 1), "--model.block_out_channels")
        validate_pixel_unet_config(self.model, self.resolution)
        for name in ("token_width", "global_width"):
            check_at_least(f"brief_encoder.{name}", getattr(self.brief_encoder, name), 1)
        check_at_least("num_previews", self.num_previews, 1)
        if not 0 <= self.field_dropout <= 1:
            raise UserError(f"--field_dropout is {self.field_dropout}; it is a share in [0, 1] (0.1 is usual)")


class PosterDecoderPhase(Phase):
    """The denoising loss on pixels, some fields of each brief left out."""

    name = "decoder"

    def __init__(self, config: Config, unet: nn.Module, brief_encoder: nn.Module, diffusion: Diffusion):
        super().__init__()
        self.unet, self.brief_encoder = unet, brief_encoder
        self.config, self.diffusion = config, diffusion
        self.most_tokens = max((side**2 for side in config.model.attention_resolutions), default=0)

    def losses(self, batch: Batch, draws: Draws, brief: dict[str, Tensor], sampling: str | None = None) -> Tensor:
        """Of each sample. B."""
        noisy = self.diffusion.corrupt(batch["pixel_values"], draws, sampling=sampling)
        tokens, whole = self.brief_encoder(**brief)
        with attention_kernel(self.most_tokens, self.config.gradient_checkpointing):
            prediction = self.unet(noisy.x_t, noisy.timesteps, encoder_hidden_states=tokens, class_labels=whole).sample
        return noisy.loss(prediction)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        brief = drop_fields(batch["brief"], draws, self.config.field_dropout, self.config.cfg_dropout)
        return self.losses(batch, draws, brief).mean(), {}


class PosterDecoderStage(Stage):
    name = "poster decoder"
    card_template = "poster_decoder.md.jinja"

    def __init__(self, config: Config):
        from pipelines.models.design_brief_encoder import DesignBriefEncoder

        self.config = config
        self._train = BriefedPosters(load_split(config, "train", config.seed), config)
        held_out = load_split(config, "validation", config.seed)
        self._validation = BriefedPosters(held_out, config, augment=False) if len(held_out) else None
        for data in filter(None, (self._train, self._validation)):
            require_clean(data, tell=logger.info)
        torch.manual_seed(config.seed)
        widths = config.brief_encoder.token_width, config.brief_encoder.global_width
        self.unet = build_pixel_unet(config.model, config.resolution, *widths)
        self.brief_encoder = DesignBriefEncoder(*widths)
        self.diffusion = Diffusion(config)
        # Of noise alone it is known; what else is predicted depends on how far the posters are from unit variance.
        self.trivial_loss = self.diffusion.trivial_loss if config.prediction_type == "epsilon" else None
        self.ema_of = {"unet": self.unet, "brief_encoder": self.brief_encoder}
        if config.init_from and not has_checkpoint(config.output_dir):
            load_initial_weights(config.init_from, self.ema_of)
        self.phase = PosterDecoderPhase(config, self.unet, self.brief_encoder, self.diffusion)
        self.phases = [self.phase]

    def train_data(self) -> BriefedPosters:
        return self._train

    def validation_data(self) -> BriefedPosters | None:
        return self._validation

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        losses = self.phase.losses(batch, draws, batch["brief"], sampling="uniform")
        return {"loss": losses.sum(), "count": torch.tensor(len(losses))}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"val_loss": sums["loss"] / sums["count"]}

    def previews(self) -> Previews:
        config, data = self.config, self._validation or self._train
        rows = range(min(config.num_previews, len(data)))
        briefs = [data.brief(row) for row in rows]
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            briefs,
            generator=[torch.Generator().manual_seed(config.seed + row) for row in rows],
            guidance_scale=config.preview_guidance_scale,
            num_inference_steps=config.preview_inference_steps,
            callback_on_step_end=self._between_steps,
        ).images
        references = fetch(data, [SampleKey(row, 0) for row in rows])["pixel_values"]
        return Previews(images, [brief.describe() for brief in briefs], [to_pil(image) for image in references])

    def _between_steps(self, pipeline, step, timestep, tensors) -> dict:
        self.poll()
        return {}

    def pipeline(self):
        from pipelines.common.schedulers import sampling_scheduler
        from pipelines.poster_decoder import PosterDecoderPipeline

        return PosterDecoderPipeline(
            unet=self.unet, scheduler=sampling_scheduler(self.diffusion.scheduler), brief_encoder=self.brief_encoder
        )


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(lambda: PosterDecoderStage(config), config)


if __name__ == "__main__":
    entry_point(main)
