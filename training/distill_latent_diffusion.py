"""Distil a trained latent diffusion model to a few steps: a student samples in 1 to 8 steps and without guidance.

    accelerate launch training/distill_latent_diffusion.py                # a student of the quickstart's model
    accelerate launch training/distill_latent_diffusion.py --teacher RUN --train_data_dir my_images --resolution 64

The teacher is a run of train_latent_diffusion.py, which stays unchanged. The student learns from its samples, and of
the data only the captions and classes are used. Run the same command again to resume the run.
"""

# Shapes: B batch, N steps of the student, C latent channels, h w latent cells.

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.commands import command_with
from training.core.draws import Draws
from training.core.exchange import Exchange
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, Phase, StageContext
from training.data.fingerprints import module_fingerprint, tokenizer_fingerprint
from training.data.images import DataConfig, ImageDataset
from training.engine.session import train
from training.models.teacher import Condition, Teacher, joined, load_teacher
from training.objectives.few_steps import advance, euler, few_step_scheduler, noise_levels
from training.objectives.functional import mse_per_sample
from training.stages.generating import GeneratingStage, RunEvaluationConfig
from training.stages.image_stage import ImageStageConfig, OpenDataset, PreviewConfig, loss_sums
from training.stages.prompted_previews import prompted_previews

PRESET = "configs/experiments/latent_diffusion/distill_quickstart.yaml"
MOST_STEPS = 8


@dataclass
class Config(PreviewConfig, RunEvaluationConfig, ImageStageConfig):
    """Flags of distill_latent_diffusion.py."""

    image_modes = DataConfig.image_modes

    output_dir: str = option("runs/distilled", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    teacher: str = option("", content="teacher", essential=True)
    """Model that is distilled, which stays frozen (required): run folder, checkpoint, pipeline folder or Hub id of a
    model trained with train_latent_diffusion.py and --prediction_type flow_prediction"""
    num_steps: int = option(4, at_least=1, at_most=MOST_STEPS, usual="4", essential=True)
    """Number of sampling steps of the student"""
    guidance_scale: float = option(2.5, at_least=0, usual="2.5", essential=True)
    """Scale of classifier-free guidance of the teacher, which becomes part of the student's weights; 1 disables it"""
    teacher_substeps: int = option(2, on_resume="warn", at_least=1)
    """Number of steps of the teacher within each step of the student"""
    preview_guidance_scale: float = option(1.0, on_resume="free", at_least=0, at_most=1)
    """Not used: a student has no guidance"""
    preview_inference_steps: int = option(0, on_resume="free", at_least=0)
    """Number of inference steps for previews; 0 for --num_steps"""
    evaluation_guidance_scale: float | None = option(None, on_resume="warn", at_least=0, at_most=1)
    """Not used: a student has no guidance"""
    evaluation_inference_steps: int = option(0, on_resume="warn", at_least=0)
    """Number of sampling steps for the images that are measured during the run; 0 for --num_steps"""
    preview_prompts: list[str] | None = option(None, on_resume="free", essential=True)
    """Prompts of the previews, e.g. 'a red circle,a blue square'; if unset, captions of the data"""

    @property
    def starts_trained(self) -> bool:
        return True  # the student begins with the weights of its teacher

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not self.teacher:
            raise UserError("--teacher is not set; give a run of train_latent_diffusion.py")
        self.preview_inference_steps = self.preview_inference_steps or self.num_steps
        self.evaluation_inference_steps = self.evaluation_inference_steps or self.num_steps


class DistillationPhase(Phase):
    """Squared error of the student's flow at the beginning of each of its steps, along samples of the teacher.

    Args:
        levels: noise levels between which the steps of the student lead, N + 1 of them.
    """

    name = "distillation"

    def __init__(self, config: Config, student: nn.Module, teacher: Teacher, levels: list[float]):
        super().__init__()
        self.config, self.teacher, self.levels = config, teacher, levels
        setattr(self, teacher.kind, student)  # under the name that it has in the pipeline
        # Kept on the device: a copy per step would wait for it.
        self.register_buffer("starts", torch.tensor(levels[:-1]), persistent=False)

    @property
    def student(self) -> nn.Module:
        return getattr(self, self.teacher.kind)

    def noise_and_condition(self, batch: Batch, draws: Draws) -> tuple[Tensor, Condition]:
        """Return the noise from which teacher and student sample (B C h w), and the condition of each sample."""
        from pipelines.common.latents import latent_shape

        shape = latent_shape(self.teacher.pipeline.vae, *batch["pixel_values"].shape[-2:])
        return draws.normal("noise", shape), self.teacher.condition(batch)

    @torch.no_grad()
    def samples(self, noise: Tensor, condition: Condition, batch: Batch, draws: Draws) -> list[Tensor]:
        """Return the teacher's samples at each noise level of the student; the last are clean. N + 1 of B C h w."""
        teacher, previous = self.teacher, None
        guides = self.config.guidance_scale > 1 and (teacher.tokens is not None or teacher.takes_labels)
        empty = teacher.condition(batch, dropped=True) if guides else None
        states = [noise]

        def flow(x: Tensor, level: float) -> Tensor:
            return teacher.guided(x, level, condition, empty)

        for start, end in pairwise(self.levels):
            x, previous = advance(states[-1], flow, start, end, self.config.teacher_substeps, previous)
            states.append(x)
        return [*states[:-1], teacher.finished(states[-1], condition, draws)]

    def losses(self, states: list[Tensor], condition: Condition) -> Tensor:
        """Compute the student's mean error over the steps for each sample. B.

        Args:
            states: see `samples`.
        """
        steps = list(zip(pairwise(states), pairwise(self.levels), strict=True))
        targets = torch.cat([(after - before) / (end - start) for (before, after), (start, end) in steps])
        starts = self.starts.repeat_interleave(len(states[0]))
        flow = self.teacher.flow(self.student, torch.cat(states[:-1]), starts, joined([condition] * len(steps)))
        return mse_per_sample(flow, targets).unflatten(0, (len(steps), -1)).mean(0)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        noise, condition = self.noise_and_condition(batch, draws)
        return self.losses(self.samples(noise, condition, batch, draws), condition).mean(), {}


class DistillationStage(GeneratingStage):
    name = "distillation"
    card_template = "latent_diffusion.md.jinja"
    takes_aspect_buckets = True

    def __init__(self, config: Config, context: StageContext):
        super().__init__(config, context)
        self.teacher = load_teacher(config.teacher, config.guidance_scale, config.gradient_checkpointing)
        self.teacher.check_images(config.teacher, config)
        self.open_data(self._dataset(), self.teacher.divisor)
        self.teacher.check_captions(config.teacher, self.training_set)
        taken = {"captions": self.teacher.tokens is not None, "classes": self.teacher.takes_labels}
        self.conditions = [name for name, is_taken in taken.items() if is_taken]
        student = copy.deepcopy(self.teacher.denoiser).requires_grad_(True)
        if student.config.get("restart_levels"):
            student.register_to_config(restart_levels=())  # it learns samples that the teacher has finished so
        self.scheduler = few_step_scheduler(self.teacher.pipeline.scheduler, config.num_steps)
        levels = noise_levels(self.scheduler, config.num_steps)
        self.phase = DistillationPhase(config, student, self.teacher, levels)
        self.phases, self.ema_of = [self.phase], {self.teacher.kind: student}
        self.frozen = self.teacher.modules
        self.take_initial_weights(self.ema_of)

    def _dataset(self) -> OpenDataset:
        """Return the function that opens rows with the condition of the teacher. Raises UserError."""
        tokens, labels = self.teacher.tokens, self.teacher.label_map(self.config.teacher, self.config)
        return functools.partial(
            ImageDataset,
            config=self.config,
            captions=tokens is not None,
            caption_tokens=tokens,
            labels=labels is not None,
            label_map=labels,
        )

    def inputs(self) -> dict[str, str]:
        found = {**super().inputs(), "teacher": module_fingerprint(*self.teacher.modules)}
        if self.teacher.tokens is not None:
            found["tokenizer"] = tokenizer_fingerprint(self.teacher.tokens.tokenizer)
        return found

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        phase = self.phase
        noise, condition = phase.noise_and_condition(batch, draws)
        states = phase.samples(noise, condition, batch, draws)

        def flow(x: Tensor, level: float) -> Tensor:
            return self.teacher.flow(phase.student, x, level, condition)

        own = euler(noise, flow, phase.levels)[-1]
        error = mse_per_sample(own, states[-1]).sum()
        power = states[-1].square().flatten(1).mean(1).sum()
        return {**loss_sums(phase.losses(states, condition)), "sample_error": error, "sample_power": power}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the mean loss, and the squared distance of the student's samples from those of its teacher for the
        same noise, relative to the mean square of the latter."""
        return {**super().metrics(sums), "val_sample_error": sums["sample_error"] / sums["sample_power"]}

    def previews(self, exchange: Exchange) -> Previews:
        teacher = self.teacher
        conditions = {"captions": teacher.tokens is not None, "labels": teacher.takes_labels}
        return prompted_previews(
            self, exchange, lambda batch, rows: batch["pixel_values"], **conditions, id2label=teacher.id2label
        )

    def usage(self, model: str) -> str:
        flags, batch = {"model": model}, self.shown_batch(self.shown_rows(1))
        if self.teacher.tokens is not None:
            flags["prompt"] = self.config.preview_prompts[0] if self.config.preview_prompts else batch["caption"][0]
        if self.teacher.takes_labels:
            flags["class_label"] = self.teacher.id2label[int(batch["label"][0])]
        return command_with("pipelines/sample.py", {**flags, "output": "grid.png"})

    def pipeline(self):
        from pipelines.latent_diffusion import LatentDiffusionPipeline

        own = self.teacher.pipeline
        parts = {"unet": None, "transformer": None, self.teacher.kind: self.phase.student}
        settings = {name: own.config[name] for name in ("prediction_type", "id2label", "max_text_length")}
        return LatentDiffusionPipeline(
            vae=own.vae,
            **parts,
            scheduler=self.scheduler,
            text_encoder=own.text_encoder,
            tokenizer=own.tokenizer,
            caption_prior=own.caption_prior,
            distilled={"num_inference_steps": self.config.num_steps, "guidance_scale": self.config.guidance_scale},
            **settings,
        )


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(DistillationStage, config)


if __name__ == "__main__":
    entry_point(main)
