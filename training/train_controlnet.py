"""Train a ControlNet: a control image (masks, edges, a sketch, class ids) steers a trained model, which stays frozen.

    accelerate launch training/train_controlnet.py --train_data_dir my_images            # makes all else that it needs
    accelerate launch training/train_controlnet.py                        # the quickstart's posters by their masks

The base model is a run of train_latent_diffusion.py or of train_decoder.py. Run the same command again to resume the
run.
"""

# Shapes: B batch, C control channels.

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.commands import command_with
from pipelines.tools.grids import control_to_pil
from training.core.draws import Draws
from training.core.exchange import Exchange
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, Phase, StageContext
from training.data.companions import control_of
from training.data.fingerprints import module_fingerprint
from training.engine.session import train
from training.metrics.control import (
    IGNORED_BELOW,
    ControlReader,
    control_metrics,
    control_sums,
    iou_sums,
    others,
)
from training.metrics.images import to_pil
from training.models.attention import attention_kernel
from training.models.steered import ControlBase, load_base
from training.objectives.diffusion import ObjectiveConfig, noise_level_metrics, noise_level_sums
from training.recipes.completion import complete_controlnet
from training.recipes.options import RecipeConfig
from training.stages.generating import GeneratingStage, RunEvaluationConfig
from training.stages.image_stage import ImageStageConfig, PreviewConfig

logger = logging.getLogger("halftone")

PRESET = "configs/experiments/controlnet/fusion_add.yaml"
MODES = ("add", "gated", "concat", "film", "cross_attention")


@dataclass
class Config(ObjectiveConfig, PreviewConfig, RunEvaluationConfig, RecipeConfig, ImageStageConfig):
    """Flags of train_controlnet.py."""

    output_dir: str = option("runs/controlnet", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    base_model: str = option("", content="base_model", essential=True)
    """Base model, which stays frozen (required): run folder, checkpoint, pipeline folder or Hub id of a model
    trained with train_latent_diffusion.py or train_decoder.py"""
    fusion_mode: str = option("add", choices=MODES, essential=True)
    """How control features enter the U-Net: add (as in ControlNet), gated (added with a learned gate), concat, film
    (scale and shift) or cross_attention"""
    conditioning_classes: int = option(0, at_least=0)
    """If the control images contain class ids, number of classes; the ids are one-hot encoded. 0: use the pixel
    values"""
    control_dropout: float = option(0.1, on_resume="warn", at_least=0, at_most=1, usual="0.1")
    """Probability of training a sample with an empty (black) control, independently of --cfg_dropout"""
    reader: str | None = option(None, on_resume="free", essential=True)
    """Layout encoder, or autoencoder with a segmentation head (run folder, checkpoint, pipeline folder or Hub id),
    that predicts the controls of generated images; their mean IoU with the true controls is logged as
    val_control_iou. If unset, this metric is not computed"""
    num_read: int = option(16, on_resume="free", at_least=1)
    """Number of images to generate at each validation for val_control_iou (see --reader)"""
    preview_inference_steps: int = option(20, on_resume="free", at_least=1)
    """Number of inference steps for previews and for val_control_iou"""
    num_previews: int = option(6, on_resume="free", at_least=1)
    """Number of samples in a preview"""

    @property
    def starts_trained(self) -> bool:
        return True  # its base model is trained, and the ControlNet begins as a copy of it

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        columns = self.conditioning_image_column
        if not columns:
            raise UserError(
                "--conditioning_image_column is empty; name a column of control images, or a list of mask columns"
            )
        if self.conditioning_classes and not isinstance(columns, str) and len(columns) > 1:
            raise UserError(
                f"--conditioning_classes {self.conditioning_classes} needs one column of class ids, but "
                f"--conditioning_image_column names {', '.join(columns)}; name one column, or set "
                "--conditioning_classes to 0"
            )
        if not self.base_model:
            raise UserError(
                "--base_model is not set; give a run of train_latent_diffusion.py or train_decoder.py; or give "
                "--train_data_dir without --config, and one is trained"
            )


class ControlNetPhase(Phase):
    """Denoising loss of the frozen base model, steered by the ControlNet."""

    name = "controlnet"

    def __init__(self, config: Config, controlnet: nn.Module, base: ControlBase):
        super().__init__()
        self.config, self.base, self.diffusion = config, base, base.objective(config)
        self.controlnet = controlnet
        self.borrow(unet=base.unet)

    def predictions(
        self, batch: Batch, draws: Draws, dropped: Tensor, controls: list[Tensor | None], sampling: str | None = None
    ) -> tuple[Any, list[Tensor]]:
        """Return one noisy batch, and the U-Net's prediction for it under each of `controls`.

        A control of None gives the prediction of the base model alone.
        """
        from pipelines.models.fusion_controlnet import steering

        x_0 = self.base.clean(batch, draws)
        noisy = self.diffusion.corrupt(x_0, draws, sampling=sampling)
        condition = self.base.condition(batch, dropped)
        model_input = self.base.model_input(noisy.x_t, condition)
        predictions = []
        for control in controls:
            nets, given = ([], []) if control is None else ([self.controlnet], [control])
            kernel = attention_kernel(x_0[0, 0].numel(), self.config.gradient_checkpointing)
            with kernel, steering(self.unet, nets, given):
                predictions.append(self.unet(model_input, noisy.timesteps, **condition).sample)
        return noisy, predictions

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        kept = draws.uniform("control_dropout") >= self.config.control_dropout
        control = batch["conditioning_pixel_values"] * kept[:, None, None, None]
        dropped = draws.uniform("cfg_dropout") < self.config.cfg_dropout
        noisy, (prediction,) = self.predictions(batch, draws, dropped, [control])
        return noisy.loss(prediction).mean(), {}


class ControlNetStage(GeneratingStage):
    name = "ControlNet"
    card_template = "controlnet.md.jinja"
    conditions = ("control images",)
    takes_aspect_buckets = True
    draws_one_size = False

    def __init__(self, config: Config, context: StageContext):
        from pipelines.models.fusion_controlnet import FusionControlNetModel

        super().__init__(config, context)
        self.base = load_base(config.base_model, config.resolution)
        columns = config.conditioning_image_column
        control = control_of(columns, config.conditioning_classes, config.conditioning_image_mode)
        if config.aspect_buckets and not self.base.takes_aspect_buckets:
            raise UserError(
                f"--aspect_buckets true: --base_model {config.base_model} draws posters from briefs, which describe "
                "squares; leave the flag out, or give a run of train_latent_diffusion.py"
            )
        self.open_data(functools.partial(self.base.dataset, config=config, control=control), self.base.divisor)
        self.reader = None
        if config.reader:
            self.reader = ControlReader(config.reader, control.kind, control.names, control.channels)
        torch.manual_seed(config.seed)
        try:
            self.controlnet = FusionControlNetModel.from_unet(
                self.base.unet,
                fusion_mode=config.fusion_mode,
                downsampling=self.base.downsampling,
                conditioning_channels=control.channels,
                control_kind=control.kind,
                control_names=control.names,
            )
        except ValueError as error:
            raise UserError(f"--base_model {config.base_model} cannot be steered: {error}") from None
        self.ema_of = {"controlnet": self.controlnet}
        self.take_initial_weights(self.ema_of)
        self.phase = ControlNetPhase(config, self.controlnet, self.base)
        self.phases = [self.phase]
        self.frozen = [*self.base.modules, *([self.reader.module] if self.reader else [])]

    def inputs(self) -> dict[str, str]:
        return {**super().inputs(), "base_model": module_fingerprint(*self.base.modules)}

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        control = batch["conditioning_pixel_values"]
        keep_all = torch.zeros(len(control), dtype=torch.bool, device=control.device)
        noisy, predictions = self.phase.predictions(
            batch, draws, keep_all, [control, None, others(control)], sampling="uniform"
        )
        losses = [noisy.loss(prediction) for prediction in predictions]
        sums = control_sums(predictions, losses) | noise_level_sums(losses[0], draws)
        return sums if self.reader is None else sums | self._iou_sums(self.reader, batch)

    def _iou_sums(self, reader: ControlReader, batch: Batch) -> dict[str, Tensor]:
        """Generate images for the first controls of the validation data, and compare what `reader` predicts with them.

        The images are generated without a prompt, so that the control alone determines what they show.
        """
        rows = [i for i, index in enumerate(batch["index"].tolist()) if index < self.config.num_read]
        predicted = reader(self._generate(batch, rows, {}, "pt") * 2 - 1) if rows else None
        return iou_sums(predicted, batch["conditioning_pixel_values"][rows])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        metrics = control_metrics(sums) | noise_level_metrics(sums)
        if metrics["val_control_gain_in_standard_errors"] < IGNORED_BELOW:
            logger.warning(
                "the model ignores its control so far: with the control of another image, its loss is higher by only "
                "%.1f standard errors; train for more steps, raise --learning_rate, or use a control that describes "
                "the image better",
                metrics["val_control_gain_in_standard_errors"],
            )
        return metrics

    def previews(self, exchange: Exchange) -> Previews:
        shown = self.shown(exchange, self._preview, self.config.num_previews)
        texts = [text for text, _ in shown]
        images = [image for _, own in shown for image in own]
        captions = [caption for text in texts for caption in ("control", text, "original")]
        return Previews(images, captions, prompts=texts, columns=6)

    def _preview(self, batch: Batch, rows: Sequence[int]) -> list[tuple[str, list[Image.Image]]]:
        """Return the caption, and the control image, the generated image and the original, of each sample."""
        samples = range(len(rows))
        conditions, texts = self.base.prompts(self.shown_data, batch, samples)
        generated = self._generate(batch, samples, conditions, "pil")
        controls = [control_to_pil(control) for control in batch["conditioning_pixel_values"]]
        originals = [to_pil(original) for original in batch["pixel_values"]]
        return list(zip(texts, map(list, zip(controls, generated, originals, strict=True)), strict=True))

    def _generate(self, batch: Batch, rows: Sequence[int], conditions: Mapping[str, Any], output_type: str) -> Any:
        """Generate images with the controls of these samples of a batch, from fixed seeds."""
        controls = batch["conditioning_pixel_values"][list(rows)]
        height, width = controls.shape[-2:]  # the base model may have been trained at another resolution
        return self.sample(
            self.pipeline(),
            seeds=[self.config.seed + int(batch["index"][row]) for row in rows],
            control_image=controls,
            height=height,
            width=width,
            output_type=output_type,
            **conditions,
        )

    def usage(self, model: str) -> str:
        return command_with("pipelines/sample.py", {"model": model, "control_image": "FILE", "output": "grid.png"})

    def pipeline(self):
        return self.base.controlled(self.controlnet)


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET, complete=complete_controlnet)
    return train(ControlNetStage, config)


if __name__ == "__main__":
    entry_point(main)
