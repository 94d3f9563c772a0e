"""Train a ControlNet: a control image (masks, edges, a sketch, class ids) steers a trained model, which stays frozen.

    accelerate launch training/train_controlnet.py                        # the quickstart's posters by their masks
    accelerate launch training/train_controlnet.py --base_model runs/mine --dataset_name data/mine \\
        --conditioning_image_column conditioning_image --fusion_mode gated --output_dir runs/controlnet_mine

The base is a run of train_latent_diffusion.py or of train_decoder.py. Typed again, a command goes on where the run
stood.
B batch, C control channels, R resolution, h w cells of the U-Net's input.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.picture_grid import control_picture
from training.core.batches import fetch
from training.core.checks import check_at_least, check_choice
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.run_config import RunConfig, option
from training.core.stage import Batch, MapDataset, Phase, Stage
from training.data.checks import require_clean
from training.data.companions import control_of
from training.data.images import DataConfig, load_split, validate_data_config
from training.engine.loop import train
from training.engine.weights import load_initial_weights
from training.metrics.control import IGNORED_BELOW, ControlReader, control_iou, in_standard_errors, others
from training.metrics.images import to_pil
from training.models.attention import attention_kernel
from training.models.steered import ControlBase, load_base
from training.objectives.diffusion import DiffusionConfig, ObjectiveConfig, validate_diffusion_config
from training.run.folder import has_checkpoint

logger = logging.getLogger("halftone")

PRESET = "configs/experiments/controlnet/fusion_add.yaml"
MODES = ("add", "gated", "concat", "film", "cross_attention")


@dataclass
class Config(ObjectiveConfig, RunConfig, DataConfig):
    """Flags of train_controlnet.py."""

    output_dir: str = option("runs/controlnet", on_resume="free")
    """The run folder"""
    base_model: str = option("", on_resume="error")
    """The model to steer: a run, checkpoint, pipeline folder or Hub id"""
    fusion_mode: str = option("add", on_resume="error")
    """How control meets the U-Net's features: add, gated, concat, film or cross_attention"""
    conditioning_classes: int = option(0, on_resume="error")
    """Above 0: conditioning_image_column holds ids of so many classes, which become one channel each"""
    control_dropout: float = option(0.1)
    """Share of samples trained with an empty (black) control"""
    init_from: str | None = option(None)
    """Start from the ControlNet of a run, checkpoint or pipeline; steps and optimizer start anew"""
    reader: str | None = option(None, on_resume="free")
    """A layout encoder, or an autoencoder with a segmentation head, that reads pictures back for val_control_iou"""
    num_read: int = option(16, on_resume="free")
    """Pictures made and read at each validation, with a reader"""
    preview_guidance_scale: float = option(2.0, on_resume="free")
    """Guidance of the previews, and of the pictures that are read"""
    preview_inference_steps: int = option(20, on_resume="free")
    """Sampling steps of the same"""
    num_previews: int = option(6, on_resume="free")
    """Samples in a preview"""

    def validate(self) -> None:
        super().validate()
        validate_data_config(self)
        objective = {name: getattr(self, name) for name in ObjectiveConfig.__dataclass_fields__}
        validate_diffusion_config(DiffusionConfig(**objective))
        check_choice("fusion_mode", self.fusion_mode, MODES)
        check_at_least("conditioning_classes", self.conditioning_classes, 0)
        check_at_least("num_read", self.num_read, 1)
        check_at_least("num_previews", self.num_previews, 1)
        if not 0 <= self.control_dropout <= 1:
            raise UserError(f"--control_dropout is {self.control_dropout}; it is a share in [0, 1] (0.1 is usual)")
        columns = self.conditioning_image_column
        if not columns:
            raise UserError(
                "--conditioning_image_column names no column; give one of control images, or a list of masks"
            )
        if self.conditioning_classes and not isinstance(columns, str) and len(columns) > 1:
            raise UserError(
                f"--conditioning_classes {self.conditioning_classes} reads class ids of one column, but "
                f"--conditioning_image_column names {', '.join(columns)}"
            )
        if not self.base_model:
            raise UserError(
                "no base model was named; give --base_model: a run of train_latent_diffusion.py or train_decoder.py"
            )


class ControlNetPhase(Phase):
    """The base model's denoising loss, with the base frozen and steered."""

    name = "controlnet"

    def __init__(self, config: Config, controlnet: nn.Module, base: ControlBase):
        super().__init__()
        self.config, self.base, self.diffusion = config, base, base.objective(config)
        self.controlnet = controlnet
        self.borrow(unet=base.unet)

    def predictions(
        self, batch: Batch, draws: Draws, dropped: Tensor, controls: list[Tensor | None], sampling: str | None = None
    ) -> tuple[Any, list[Tensor]]:
        """One noisy batch, and what is predicted of it under each of `controls` (None: the base model alone)."""
        from pipelines.models.fusion_controlnet import steering

        x_0 = self.base.clean(batch, draws)
        noisy = self.diffusion.corrupt(x_0, draws, sampling=sampling)
        condition = self.base.condition(batch, dropped)
        model_input = self.base.model_input(noisy.x_t, condition)
        found = []
        for control in controls:
            nets, given = ([], []) if control is None else ([self.controlnet], [control])
            kernel = attention_kernel(x_0[0, 0].numel(), self.config.gradient_checkpointing)
            with kernel, steering(self.unet, nets, given):
                found.append(self.unet(model_input, noisy.timesteps, **condition).sample)
        return noisy, found

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        kept = draws.uniform("control_dropout") >= self.config.control_dropout
        control = batch["conditioning_pixel_values"] * kept[:, None, None, None]
        dropped = draws.uniform("cfg_dropout") < self.config.cfg_dropout
        noisy, (prediction,) = self.predictions(batch, draws, dropped, [control])
        return noisy.loss(prediction).mean(), {}


class ControlNetStage(Stage):
    name = "ControlNet"
    card_template = "controlnet.md.jinja"

    def __init__(self, config: Config):
        from pipelines.models.fusion_controlnet import FusionControlNetModel

        self.config = config
        self.base = load_base(config.base_model, config.resolution)
        columns = config.conditioning_image_column
        control = control_of(columns, config.conditioning_classes, config.conditioning_image_mode)
        self._train = self.base.dataset(load_split(config, "train", config.seed), config, control, augment=True)
        held_out = load_split(config, "validation", config.seed)
        self._validation = self.base.dataset(held_out, config, control, augment=False) if len(held_out) else None
        for data in filter(None, (self._train, self._validation)):
            require_clean(data, tell=logger.info)
        self.reader = (
            ControlReader(config.reader, control.kind, control.names, control.channels) if config.reader else None
        )
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
        if config.init_from and not has_checkpoint(config.output_dir):
            load_initial_weights(config.init_from, self.ema_of)
        self.phase = ControlNetPhase(config, self.controlnet, self.base)
        self.phases = [self.phase]
        self.frozen = [*self.base.modules, *([self.reader.module] if self.reader else [])]

    def train_data(self) -> MapDataset:
        return self._train

    def validation_data(self) -> MapDataset | None:
        return self._validation

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        control = batch["conditioning_pixel_values"]
        keep_all = torch.zeros(len(control), dtype=torch.bool, device=control.device)
        noisy, (true, none, shuffled) = self.phase.predictions(
            batch, draws, keep_all, [control, None, others(control)], sampling="uniform"
        )
        losses = [noisy.loss(prediction) for prediction in (true, none, shuffled)]
        gain = losses[2] - losses[0]
        sums = {"count": torch.tensor(len(control)), "gain": gain.sum(), "gain_squares": gain.double().square().sum()}
        for name, loss in zip(("true", "none", "shuffled"), losses, strict=True):
            sums[name] = loss.sum()
        sums["power"] = true.float().square().sum()
        sums["change_none"] = (true - none).float().square().sum()
        sums["change_shuffled"] = (true - shuffled).float().square().sum()
        if self.reader is not None:
            sums |= self._read(batch)
        return sums

    def _read(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures made of the first controls of the validation data and read back: their IoU with their control, and
        with another's. Without prompts: nothing but the control tells what to draw."""
        rows = [i for i, index in enumerate(batch["index"].tolist()) if index < self.config.num_read]
        sums = dict.fromkeys(("read", "iou", "iou_shuffled", "iou_gain", "iou_gain_squares"), torch.tensor(0.0))
        if not rows:
            return sums
        assert self.reader is not None
        control = batch["conditioning_pixel_values"][rows]
        read = self.reader(self._paint(batch, rows, {}, "pt") * 2 - 1)
        own, other = control_iou(read, control), control_iou(read, others(control))
        gain = own - other
        return {
            "read": torch.tensor(float(len(rows))), "iou": own.sum(), "iou_shuffled": other.sum(),
            "iou_gain": gain.sum(), "iou_gain_squares": gain.double().square().sum(),
        }  # fmt: skip

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        count = sums["count"]
        gain = in_standard_errors(sums["gain"], sums["gain_squares"], count)
        metrics = {
            "val_loss": sums["true"] / count,
            "val_loss_without_control": sums["none"] / count,
            "val_loss_shuffled_control": sums["shuffled"] / count,
            "val_control_sensitivity": (sums["change_none"] / sums["power"]) ** 0.5,
            "val_shuffled_sensitivity": (sums["change_shuffled"] / sums["power"]) ** 0.5,
            "val_control_gain_in_standard_errors": gain,
        }
        if sums.get("read"):
            metrics["val_control_iou"] = sums["iou"] / sums["read"]
            metrics["val_shuffled_iou"] = sums["iou_shuffled"] / sums["read"]
            metrics["val_iou_gain_in_standard_errors"] = in_standard_errors(
                sums["iou_gain"], sums["iou_gain_squares"], sums["read"]
            )
        if gain < IGNORED_BELOW:
            logger.warning(
                "the model ignores its control so far: with the control of another picture its loss is higher by %.1f "
                "standard errors only; more steps, a higher --learning_rate, or a control that says something of the "
                "picture",
                gain,
            )
        return metrics

    def previews(self) -> Previews:
        data = self._validation or self._train
        rows = list(range(min(self.config.num_previews, len(data))))
        batch = fetch(data, [SampleKey(row, 0) for row in rows])
        arguments, words = self.base.prompts(data, batch, rows)
        painted = self._paint(batch, rows, arguments, "pil")
        controls = [control_picture(control) for control in batch["conditioning_pixel_values"]]
        images, captions = [], []
        for control, image, real, text in zip(controls, painted, batch["pixel_values"], words, strict=True):
            images += [control, image, to_pil(real)]
            captions += ["control", text, "the real one"]
        return Previews(images, captions, columns=6)

    def _paint(self, batch: Batch, rows: list[int], prompts: Mapping[str, Any], output_type: str) -> Any:
        """Pictures with the controls of these samples, from fixed seeds."""
        config = self.config
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            **prompts,
            control_image=batch["conditioning_pixel_values"][rows],
            height=config.resolution,  # the base may have been trained at another
            width=config.resolution,
            generator=[torch.Generator().manual_seed(config.seed + int(batch["index"][row])) for row in rows],
            guidance_scale=config.preview_guidance_scale,
            num_inference_steps=config.preview_inference_steps,
            output_type=output_type,
            callback_on_step_end=self._between_steps,
        ).images

    def _between_steps(self, pipeline, step, timestep, tensors) -> dict:
        self.poll()
        return {}

    def pipeline(self):
        return self.base.controlled(self.controlnet)


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(lambda: ControlNetStage(config), config)


if __name__ == "__main__":
    entry_point(main)
