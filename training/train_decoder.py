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
from training.models.posters import BriefEncoderConfig
from training.models.unet import PixelUNetConfig, build_pixel_unet
from training.objectives.diffusion import Diffusion, DiffusionConfig, noise_level_sums
from training.stages.generating import GeneratingStage, RunEvaluationConfig
from training.stages.image_stage import ImageStageConfig, PreviewConfig, loss_sums

PRESET = "configs/experiments/posters/decoder_64.yaml"


@dataclass
class Config(DiffusionConfig, PreviewConfig, RunEvaluationConfig, ImageStageConfig):
    """Flags of train_decoder.py."""

    output_dir: str = option("runs/posters/decoder", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    model: PixelUNetConfig = option(PixelUNetConfig)
    """The U-Net"""
    brief_encoder: BriefEncoderConfig = option(BriefEncoderConfig)
    """The encoder of the design brief, trained jointly with the U-Net"""
    field_dropout: float = option(0.1, on_resume="warn", at_least=0, at_most=1, usual="0.1")
    """Average fraction of a brief's fields dropped in training; most briefs lose few or none, some lose most"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        self.model.check_resolution(self.resolution)


class PosterDecoderPhase(Phase):
    """Denoising loss on pixels, with some fields of the briefs dropped."""

    name = "decoder"

    def __init__(self, config: Config, unet: nn.Module, brief_encoder: nn.Module, diffusion: Diffusion):
        super().__init__()
        self.unet, self.brief_encoder = unet, brief_encoder
        self.config, self.diffusion = config, diffusion
        self.most_tokens = max((side**2 for side in config.model.attention_resolutions), default=0)

    def losses(self, batch: Batch, draws: Draws, brief: dict[str, Tensor], sampling: str | None = None) -> Tensor:
        """Compute the loss of each sample. B."""
        noisy = self.diffusion.corrupt(batch["pixel_values"], draws, sampling=sampling)
        tokens, vector = self.brief_encoder(**brief)
        with attention_kernel(self.most_tokens, self.config.gradient_checkpointing):
            prediction = self.unet(noisy.x_t, noisy.timesteps, encoder_hidden_states=tokens, class_labels=vector).sample
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
        self.unet = build_pixel_unet(config.model, config.resolution, *widths)
        self.brief_encoder = DesignBriefEncoder(*widths)
        self.diffusion = Diffusion(config)
        # Known only where the target is the noise; for other targets it depends on the variance of the posters.
        self.trivial_loss = self.diffusion.trivial_loss if config.prediction_type == "epsilon" else None
        self.ema_of = {"unet": self.unet, "brief_encoder": self.brief_encoder}
        self.take_initial_weights(self.ema_of)
        self.phase = PosterDecoderPhase(config, self.unet, self.brief_encoder, self.diffusion)
        self.phases = [self.phase]

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
            unet=self.unet, scheduler=sampling_scheduler(self.diffusion.scheduler), brief_encoder=self.brief_encoder
        )


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(PosterDecoderStage, config)


if __name__ == "__main__":
    entry_point(main)
