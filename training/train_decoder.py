"""Train the poster decoder from scratch: design brief → poster, by diffusion in pixel space.

    accelerate launch training/train_decoder.py                           # 64 px, on generated posters
    accelerate launch training/train_decoder.py --config configs/experiments/posters/decoder.yaml
    accelerate launch training/train_decoder.py --dataset_name data/posters_128 --resolution 128 --extra_epochs 2

Run the same command again to resume the run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from pipelines.tools.cli import entry_point
from training.core.options import option
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.data.briefs import BriefedPosters
from training.engine.session import train
from training.models.posters import BriefEncoderConfig
from training.models.unet import PixelUNetConfig, build_pixel_unet
from training.objectives.diffusion import Diffusion, DiffusionConfig
from training.stages.decoding import DecodingStage, FieldDropoutConfig, PosterDecoderPhase
from training.stages.generating import RunEvaluationConfig
from training.stages.image_stage import ImageStageConfig, PreviewConfig

PRESET = "configs/experiments/posters/decoder_64.yaml"


@dataclass
class Config(FieldDropoutConfig, DiffusionConfig, PreviewConfig, RunEvaluationConfig, ImageStageConfig):
    """Flags of train_decoder.py."""

    output_dir: str = option("runs/posters/decoder", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    model: PixelUNetConfig = option(PixelUNetConfig)
    """The U-Net"""
    brief_encoder: BriefEncoderConfig = option(BriefEncoderConfig)
    """The encoder of the design brief, trained jointly with the U-Net"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        self.model.check_resolution(self.resolution)


class PosterDecoderStage(DecodingStage):
    name = "poster decoder"

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


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(PosterDecoderStage, config)


if __name__ == "__main__":
    entry_point(main)
