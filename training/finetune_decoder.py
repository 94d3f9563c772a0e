"""Fine-tune a trained poster decoder so that its posters have the layout, palette and counts that their briefs ask for.

    accelerate launch training/finetune_decoder.py                        # makes all that it needs
    accelerate launch training/finetune_decoder.py --decoder runs/posters/decoder_64 \\
        --reader runs/posters/abstractor_64 --judge runs/posters/abstractor_64_judge --gradient_steps 4 \\
        --dataset_name data/posters_standard_64_10k --output_dir runs/mine

A layout encoder and an abstractor (the reader) read what the decoder generates, and their gradient improves it. A
second reader, the judge, measures the result. Run the same command again to resume the run.
"""

# Shapes: B batch, H W pixels, G grammar numbers.

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.common.design_brief import NUMBERS
from pipelines.common.poster_domain import GRAMMAR
from pipelines.common.sampling import guided
from pipelines.tools.cli import UserError, entry_point
from training.core.draws import Draws
from training.core.options import option
from training.core.parsing import parse_config
from training.core.stage import Batch, StageContext
from training.data.briefs import BriefedPosters
from training.data.fingerprints import module_fingerprint
from training.data.posters import require_poster_columns
from training.engine.schedule import LR_SCHEDULERS
from training.engine.session import train
from training.models.lora import LoRAAdapter, LoRAConfig
from training.models.reader import PosterReader, check_independent, load_reader
from training.objectives.cycle import counts_loss, grammar_loss, palette_loss
from training.objectives.diffusion import Diffusion, ObjectiveConfig, diffusion_of_pipeline
from training.objectives.unrolled import noise_levels, unrolled
from training.stages.before_after import BeforeAfterConfig, BeforeAfterStage
from training.stages.decoding import FieldDropoutConfig, PosterDecoderPhase
from training.stages.generating import RunEvaluationConfig
from training.stages.image_stage import ImageStageConfig, PreviewConfig
from training.stages.lora import LoRATraining

PRESET = "configs/experiments/posters/finetune_plain_64.yaml"
FIRST_GRAMMAR = NUMBERS.index(GRAMMAR[0])
IMAGE_MASK = 1  # channel of the features that a layout encoder predicts


@dataclass
class Config(
    LoRAConfig,
    BeforeAfterConfig,
    FieldDropoutConfig,
    ObjectiveConfig,
    PreviewConfig,
    RunEvaluationConfig,
    ImageStageConfig,
):
    """Flags of finetune_decoder.py."""

    output_dir: str = option("runs/posters/finetuned", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    decoder: str = option("", content="decoder", essential=True)
    """Poster decoder to fine-tune (required): run folder, checkpoint, pipeline folder or Hub id of a model trained with
    train_decoder.py"""
    reader: str = option("", content="reader", essential=True)
    """Model that reads the generated posters, and whose gradient trains the decoder (required): a run of
    train_abstractor.py with --encoder; it stays unchanged"""
    judge: str | None = option(None, on_resume="free", essential=True)
    """Second reader, trained with another seed, which only measures the decoder before and after; if unset, only
    --reader does, whose measurements are too good"""
    lora_rank: int = option(0, at_least=0, usual="8")
    """Train a LoRA adapter of this rank for the layers of --decoder that --lora_targets names, whose own weights stay
    as they are; 0 trains all weights. An adapter needs a higher --learning_rate, such as 1e-3"""
    sampling_steps: int = option(8, on_resume="warn", at_least=1)
    """Number of sampling steps of the posters that the reader reads in training"""
    gradient_steps: int = option(1, on_resume="warn", at_least=1)
    """Number of last sampling steps with a gradient (DRaFT-K, Clark et al. 2023); each of them costs as much memory as
    a training step, and the presets have 4"""
    sampling_guidance_scale: float = option(2.0, on_resume="warn", at_least=0)
    """Scale of classifier-free guidance of these posters; 1 disables it and halves the time of sampling"""
    diffusion_weight: float = option(1.0, on_resume="warn", at_least=0)
    """Weight of the diffusion loss on the posters of the dataset, which keeps the generated ones similar to them"""
    grammar_weight: float = option(0.7, on_resume="warn", at_least=0)
    """Weight of the squared error of the grammar numbers that are read, standardized"""
    palette_weight: float = option(0.5, on_resume="warn", at_least=0)
    """Weight of the distance of colours from the palette"""
    counts_weight: float = option(0.01, on_resume="warn", at_least=0)
    """Weight of the cross-entropy of the numbers of texts and of images that are read"""
    learning_rate: float = option(2e-4, on_resume="warn", above=0, usual="2e-4", essential=True)
    """Peak learning rate; a rate that does not decay to zero costs more than the readers give back"""
    lr_scheduler: str = option("linear", on_resume="warn", choices=LR_SCHEDULERS)
    """Learning-rate schedule: linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup or
    piecewise_constant"""
    lr_warmup_steps: int | None = option(20, on_resume="warn", at_least=0)
    """Number of optimizer steps over which the learning rate rises from 0 to its peak, at most 5 % of the steps of the
    run. Not used with constant and piecewise_constant"""
    adam_beta2: float = option(0.99, on_resume="warn", at_least=0, below=1)
    """Adam's beta2, the decay rate of the second moment"""
    ema_decay: float = option(0.99, on_resume="warn", at_least=0, below=1, usual="0.99")
    """Decay of the EMA weights"""
    num_train_epochs: int = option(1, on_resume="free", at_least=0, essential=True)
    """Total number of epochs, counted from the first start of the run"""
    evaluation_images: int = option(128, on_resume="warn", at_least=8)
    """Number of posters generated for each measurement during the run; --report_images is that of the report"""
    report_images: int | None = option(256, on_resume="free", at_least=8)
    """Number of posters before and of posters after that the report is about; null for --evaluation_images"""
    evaluation_steps: int = option(100, on_resume="warn", at_least=0)
    """Measure posters for held-out briefs every N optimizer steps, in addition to --evaluation_epochs; 0 disables it"""
    evaluation_epochs: int = option(0, on_resume="warn", at_least=0, essential=True)
    """Measure posters for held-out briefs every N epochs as well: the cycle score, their distance from real posters,
    their diversity, and copies of training images. The best checkpoint is chosen by the cycle score"""
    early_stopping_patience: int = option(3, on_resume="warn", at_least=0)
    """Stop after N measurements in a row without a better cycle score within the limits of --max_kid_rise and
    --max_diversity_fall; 0 disables it. A run always stops at the second measurement in a row beyond these limits"""

    @property
    def starts_trained(self) -> bool:
        return True

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        for name, command in (("decoder", "train_decoder.py"), ("reader", "train_abstractor.py with --encoder")):
            if not getattr(self, name):
                raise UserError(f"--{name} is not set; give a run of {command}")
        if self.init_from:
            raise UserError(f"--init_from {self.init_from}: training starts from --decoder; leave this flag out")
        if self.gradient_steps > self.sampling_steps:
            raise UserError(
                f"--gradient_steps {self.gradient_steps} is larger than --sampling_steps {self.sampling_steps}; lower "
                "it, or sample in more steps"
            )
        if not (self.evaluation_epochs or self.evaluation_steps):
            raise UserError(
                "--evaluation_epochs 0: the best checkpoint is chosen by measurements of generated posters; set it or "
                "--evaluation_steps to a larger number"
            )
        if not self.grammar_weight + self.palette_weight + self.counts_weight:
            raise UserError(
                "--grammar_weight, --palette_weight and --counts_weight are 0, so nothing would be learned from "
                "--reader; set one of them to a larger number"
            )


class FinetuningPhase(PosterDecoderPhase):
    """The diffusion loss on real posters, and the cycle loss of generated ones.

    Args:
        reader: is used, but not trained.
    """

    def __init__(
        self,
        config: Config,
        kind: str,
        denoiser: nn.Module,
        brief_encoder: nn.Module,
        diffusion: Diffusion,
        reader: PosterReader,
        adapter: LoRAAdapter | None = None,
    ):
        super().__init__(config, kind, denoiser, brief_encoder, diffusion, adapter)
        self.borrow(reader=reader)
        self.levels = noise_levels(diffusion, config.sampling_steps)

    def generate(self, brief: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """Generate posters with a gradient through the last steps: B 3 H W in [-1, 1]."""
        scale = self.config.sampling_guidance_scale if self.config.sampling_guidance_scale > 1 else None
        tokens, vector = self.brief_encoder(**(brief if scale is None else _with_empty_briefs(brief)))

        def predict(x_t: Tensor, timestep: float) -> Tensor:
            model_input = x_t if scale is None else torch.cat([x_t, x_t])
            timesteps = model_input.new_full((len(model_input),), timestep)
            return guided(self.predict(model_input, timesteps, tokens, vector).float(), scale)

        prediction_type = self.diffusion.config.prediction_type
        posters = unrolled(predict, noise, self.levels, prediction_type, self.config.gradient_steps)
        return posters.clamp(-1, 1)

    def cycle_losses(self, posters: Tensor, brief: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read posters (B 3 H W in [-1, 1]) and compare what is read with their briefs."""
        features, read = self.reader(posters)
        asked, present = (brief[name][:, FIRST_GRAMMAR:] for name in ("numbers", "numbers_present"))
        outside = features[:, IMAGE_MASK].detach() < 0.5
        return {
            "grammar": grammar_loss(read.standardized, self.reader.abstractor.standardize(asked), present),
            "palette": palette_loss((posters + 1) / 2, brief["palette"], brief["palette_present"], outside),
            "counts": counts_loss(read.counts, brief["counts"], brief["counts_present"]),
        }

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        diffusion, _ = super().forward(batch, draws)
        posters = self.generate(batch["brief"], draws.normal("generated", batch["pixel_values"].shape[1:]))
        losses = {"diffusion": diffusion, **self.cycle_losses(posters, batch["brief"])}
        total = sum(getattr(self.config, f"{name}_weight") * loss for name, loss in losses.items())
        return total, {f"{name}_loss": loss.detach() for name, loss in losses.items()}  # type: ignore[return-value]


def _with_empty_briefs(brief: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return brief tensors of twice the size: briefs without any field, and then the given ones."""
    return {
        name: torch.cat([torch.zeros_like(value) if name.endswith("_present") else value, value])
        for name, value in brief.items()
    }


class FinetuningStage(BeforeAfterStage):
    name = "fine-tuning of the poster decoder"

    def __init__(self, config: Config, context: StageContext):
        super().__init__(config, context)
        decoder = load_decoder(config.decoder, config.resolution)
        self.reader = load_reader(config.reader, config.resolution, "--reader")
        self.judge = load_reader(config.judge, config.resolution, "--judge") if config.judge else None
        if self.judge is not None:
            check_independent(self.judge, self.reader, str(config.judge))
        self.open_data(functools.partial(BriefedPosters, config=config))
        require_poster_columns(self.training_set.dataset, GRAMMAR, str(config.source))
        kind = "unet" if decoder.transformer is None else "transformer"
        self.diffusion = diffusion_of_pipeline(decoder, config)
        networks = {kind: decoder.denoiser, "brief_encoder": decoder.brief_encoder}
        self.original = nn.ModuleDict({name: copy.deepcopy(module) for name, module in networks.items()})
        self.lora = LoRATraining(config, networks, [*networks], config.decoder) if config.lora_rank else None
        adapter = None if self.lora is None else self.lora.adapter
        own = decoder.denoiser, decoder.brief_encoder
        self.phase = FinetuningPhase(config, kind, *own, self.diffusion, self.reader, adapter)
        self.phases, self.ema_of = [self.phase], dict(self.phase.named_children())
        self.frozen = [self.original, self.reader, *([self.judge] if self.judge is not None else [])]
        if self.lora is not None:
            self.frozen, self.data_notes = [*self.frozen, *networks.values()], [self.lora.adapter.describe()]

    def networks(self) -> dict[str, Any]:
        own = super().networks()
        if self.lora is None or self._keeps_original:
            return own
        return {name: self.lora.fused(name) for name in own}

    def save_pipeline(self, folder: Path) -> None:
        super().save_pipeline(folder)
        if self.lora is not None and not self._keeps_original:
            self.lora.save(folder)

    def card_facts(self) -> dict[str, Any]:
        own = super().card_facts()
        return own if self.lora is None or self._keeps_original else {**own, **self.lora.card_facts()}

    def inputs(self) -> dict[str, str]:
        modules = {"decoder": self.original, "reader": self.reader}
        return {**super().inputs(), **{name: module_fingerprint(module) for name, module in modules.items()}}


def load_decoder(path: str, resolution: int) -> Any:
    """Load the pipeline of the poster decoder at `path` (run, checkpoint, pipeline folder or Hub id).

    Raises:
        UserError: it is another model, or was trained on posters of another side.
    """
    from pipelines.poster_decoder import PosterDecoderPipeline
    from pipelines.tools.loading import load_pipeline

    pipeline = load_pipeline(path)
    if not isinstance(pipeline, PosterDecoderPipeline) or "controlnet" in pipeline.components:
        raise UserError(
            f"--decoder {path} is a {type(pipeline).__name__}, not a poster decoder; give a run of train_decoder.py"
        )
    if (side := pipeline.denoiser.config.sample_size) != resolution:
        raise UserError(
            f"--decoder {path} generates posters of {side} px, but --resolution is {resolution}; set "
            f"--resolution {side}"
        )
    return pipeline


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(FinetuningStage, config)


if __name__ == "__main__":
    entry_point(main)
