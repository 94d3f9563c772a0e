"""Train the poster decoder from scratch: design brief → poster, by diffusion in pixel space.

    accelerate launch training/train_decoder.py                           # 64 px, on generated posters
    accelerate launch training/train_decoder.py --config configs/experiments/posters/decoder.yaml
    accelerate launch training/train_decoder.py --dataset_name data/posters_128 --resolution 128 --extra_epochs 2

Run the same command again to resume the run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from pipelines.tools.cli import entry_point
from training.core.options import option
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.data.briefs import BriefedPosters
from training.engine.session import train
from training.models.denoiser import build_pixel_denoiser, check_prediction
from training.models.posters import BriefEncoderConfig
from training.models.transformer import TransformerConfig
from training.models.unet import PixelUNetConfig
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
    denoiser: Literal["unet", "transformer"] = option("unet")
    """The network that denoises: a U-Net (--model), or a transformer on patches (--transformer), which learns more in a
    short time on a CPU, and which no ControlNet can steer"""
    model: PixelUNetConfig = option(PixelUNetConfig)
    """The U-Net"""
    transformer: TransformerConfig = option(TransformerConfig)
    """The transformer, with --denoiser transformer"""
    brief_encoder: BriefEncoderConfig = option(BriefEncoderConfig)
    """The encoder of the design brief, trained jointly with the network that denoises"""

    @property
    def consists_of_products(self) -> bool:
        return self.denoiser == "transformer"

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.denoiser == "unet":
            self.model.check_resolution(self.resolution)
        check_prediction(self)


class PosterDecoderStage(DecodingStage):
    name = "poster decoder"

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
        self.phase = PosterDecoderPhase(config, config.denoiser, denoiser, self.brief_encoder, self.diffusion)
        self.phases, self.ema_of = [self.phase], dict(self.phase.named_children())
        self.take_initial_weights(self.ema_of)


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(PosterDecoderStage, config)


if __name__ == "__main__":
    entry_point(main)
