"""Train the poster decoder from scratch: design brief → poster, by diffusion in pixel space.

    accelerate launch training/train_decoder.py                           # 64 px, on generated posters
    accelerate launch training/train_decoder.py --config configs/experiments/posters/decoder.yaml
    accelerate launch training/train_decoder.py --dataset_name data/posters_128 --resolution 128 --extra_epochs 2

Run the same command again to resume the run.
"""

# Shapes: B batch.

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipelines.tools.cli import entry_point
from pipelines.tools.commands import command_with
from training.core.draws import Draws
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, Phase, StageContext
from training.data.briefs import BriefedPosters, drop_fields
from training.engine.session import train
from training.metrics.images import to_pil
from training.models.attention import attention_kernel
from training.models.denoiser import build_pixel_denoiser, check_prediction
from training.models.posters import BriefEncoderConfig
from training.models.transformer import TransformerConfig
from training.models.unet import PixelUNetConfig
from training.objectives.diffusion import Diffusion, DiffusionConfig, noise_level_sums
from training.stages.generating import GeneratingStage, RunEvaluationConfig
from training.stages.image_stage import ImageStageConfig, PreviewConfig, loss_sums

PRESET = "configs/experiments/posters/decoder_64.yaml"


@dataclass
class Config(DiffusionConfig, PreviewConfig, RunEvaluationConfig, ImageStageConfig):
    """Flags of train_decoder.py."""

    output_dir: str = option("runs/posters/decoder", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    denoiser: Literal["unet", "transformer"] = option("unet")
    """The network that denoises: a U-Net (--model), or a transformer on patches (--transformer), which learns more in a
    short time on a CPU, and which no ControlNet can steer"""
    model: PixelUNetConfig = option(PixelUNetConfig)
    """The U-Net"""
    transformer: TransformerConfig = option(TransformerConfig)
    """The transformer, with --denoiser transformer"""
    brief_encoder: BriefEncoderConfig = option(BriefEncoderConfig)
    """The encoder of the design brief, trained jointly with the network that denoises"""
    field_dropout: float = option(0.1, on_resume="warn", at_least=0, at_most=1, usual="0.1")
    """Average fraction of a brief's fields dropped in training; most briefs lose few or none, some lose most"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.denoiser == "unet":
            self.model.check_resolution(self.resolution)
        check_prediction(self)


class PosterDecoderPhase(Phase):
    """Denoising loss on pixels, with some fields of the briefs dropped."""

    name = "decoder"

    def __init__(self, config: Config, denoiser: nn.Module, brief_encoder: nn.Module, diffusion: Diffusion):
        super().__init__()
        setattr(self, config.denoiser, denoiser)  # under the name that it has in the pipeline
        self.brief_encoder = brief_encoder
        self.config, self.diffusion = config, diffusion
        self.most_tokens = max((side**2 for side in config.model.attention_resolutions), default=0)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self, self.config.denoiser)

    def losses(self, batch: Batch, draws: Draws, brief: dict[str, Tensor], sampling: str | None = None) -> Tensor:
        """Compute the loss of each sample. B."""
        noisy = self.diffusion.corrupt(batch["pixel_values"], draws, sampling=sampling)
        tokens, vector = self.brief_encoder(**brief)
        with attention_kernel(self.most_tokens, self.config.gradient_checkpointing):
            condition = {"encoder_hidden_states": tokens, "class_labels": vector}
            prediction = self.denoiser(noisy.x_t, noisy.timesteps, **condition).sample
        return noisy.loss(prediction)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        brief = drop_fields(batch["brief"], draws, self.config.field_dropout, self.config.cfg_dropout)
        return self.losses(batch, draws, brief).mean(), {}


class PosterDecoderStage(GeneratingStage):
    name = "poster decoder"
    card_template = "poster_decoder.md.jinja"
    conditions = ("briefs",)

    def __init__(self, config: Config, context: StageContext):
        from pipelines.models.design_brief_encoder import DesignBriefEncoder

        super().__init__(config, context)
        self.open_data(functools.partial(BriefedPosters, config=config))
        torch.manual_seed(config.seed)
        widths = config.brief_encoder.token_width, config.brief_encoder.global_width
        denoiser = build_pixel_denoiser(config, config.resolution, *widths)
        self.brief_encoder = DesignBriefEncoder(*widths)
        self.diffusion = Diffusion(config)
        # Known only where the target is the noise; for other targets it depends on the variance of the posters.
        self.trivial_loss = self.diffusion.trivial_loss if config.prediction_type == "epsilon" else None
        self.phase = PosterDecoderPhase(config, denoiser, self.brief_encoder, self.diffusion)
        self.phases, self.ema_of = [self.phase], dict(self.phase.named_children())
        self.take_initial_weights(self.ema_of)

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        losses = self.phase.losses(batch, draws, batch["brief"], sampling="uniform")
        return loss_sums(losses) | noise_level_sums(losses, draws)

    def previews(self) -> Previews:
        rows = self.shown_rows(self.config.num_previews)
        briefs = [self.shown_data.brief(row) for row in rows]
        images = self.sample(self.pipeline(), briefs, seeds=[self.config.seed + row for row in rows])
        references = [to_pil(image) for image in self.shown_batch(rows)["pixel_values"]]
        return Previews(images, [brief.describe() for brief in briefs], references)

    def usage(self, model: str) -> str:
        return command_with("pipelines/sample.py", {"model": model, "brief": "random", "output": "grid.png"})

    def pipeline(self):
        from pipelines.common.schedulers import sampling_scheduler
        from pipelines.poster_decoder import PosterDecoderPipeline

        return PosterDecoderPipeline(
            **{"unet": None, self.config.denoiser: self.phase.denoiser},
            scheduler=sampling_scheduler(self.diffusion.scheduler),
            brief_encoder=self.brief_encoder,
        )


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(PosterDecoderStage, config)


if __name__ == "__main__":
    entry_point(main)
