"""Train the layout encoder: image of a poster → feature tensor (text mask, image mask, colour roles, hierarchy).

    accelerate launch training/train_encoder.py                           # on small generated posters
    accelerate launch training/train_encoder.py --config configs/experiments/posters/encoder_small.yaml
    accelerate launch training/train_encoder.py --dataset_name data/posters_256 --resolution 256 --output_dir runs/mine

Run the same command again to resume the run.
"""

# Shapes: B batch, H W pixels, K colour roles.

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.common.poster_domain import COLOR_ROLES
from pipelines.tools.cli import UserError, entry_point
from training.core.draws import Draws, SampleKey
from training.core.exchange import Exchange
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, Phase, StageContext
from training.data.fingerprints import evenly_spaced
from training.data.posters import PosterDataConfig, PosterDataset
from training.engine.session import train
from training.metrics.images import to_pil
from training.models.posters import LayoutEncoderConfig, build_layout_encoder
from training.objectives.segmentation import class_hits, dice_loss, mask_overlap, mean_class_accuracy, one_hot
from training.stages.image_stage import ImageStage, ImageStageConfig

PRESET = "configs/experiments/posters/encoder_tiny.yaml"
PREVIEWS = 6
ROLE_POSTERS = 256
MASKS = ("text_mask", "image_mask")


@dataclass
class Config(ImageStageConfig, PosterDataConfig):
    """Flags of train_encoder.py."""

    output_dir: str = option("runs/encoder", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    model: LayoutEncoderConfig = option(LayoutEncoderConfig)
    """The layout encoder"""
    dice_weight: float = option(1.0, on_resume="warn", at_least=0)
    """Weight of the Dice losses of masks and colour roles"""
    ce_weight: float = option(1.0, on_resume="warn", at_least=0)
    """Weight of the cross-entropy losses of masks and colour roles"""
    mse_weight: float = option(5.0, on_resume="warn", at_least=0)
    """Weight of the squared error of the hierarchy"""
    role_balance: float = option(0.5, on_resume="warn", at_least=0)
    """Exponent p of the colour role weights in the cross-entropy, (fraction of pixels) ** -p; 0 weights all equally"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not (self.dice_weight or self.ce_weight or self.mse_weight):
            raise UserError("nothing to learn from: one of --dice_weight, --ce_weight, --mse_weight must be above 0")
        self.model.check_resolution(self.resolution)


class LayoutEncoderPhase(Phase):
    """Loss of the encoder: Dice and cross-entropy losses of masks and colour roles, squared error of the hierarchy."""

    name = "encoder"

    role_weights: Tensor

    def __init__(self, encoder: Any, config: Config, role_weights: Tensor):
        super().__init__()
        self.encoder, self.config = encoder, config
        self.register_buffer("role_weights", role_weights, persistent=False)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config, output = self.config, self.encoder(batch["pixel_values"])
        metrics = {name: torch.stack(losses).sum() for name, losses in self.losses(output, batch).items()}
        weights = {"dice": config.dice_weight, "ce": config.ce_weight, "mse": config.mse_weight}
        loss = torch.stack([weights[name] * value for name, value in metrics.items()]).sum()
        return loss, {name: value.detach() for name, value in metrics.items()}

    def losses(self, output: Any, batch: Batch) -> dict[str, list[Tensor]]:
        """Compute the loss terms by kind; each kind has one term for each head that uses it."""
        role, true_role = output.color_role.float(), batch["color_role"]
        dice = [dice_loss(role.softmax(1), one_hot(true_role, role.shape[1]))]
        # With F.cross_entropy(weight=...), which divides by the sum of the weights, the contribution of a sample would
        # depend on the other samples of its micro-batch.
        cross_entropy = [(self.role_weights[true_role] * F.cross_entropy(role, true_role, reduction="none")).mean()]
        for name in MASKS:
            logits = output[name].float()
            dice.append(dice_loss(logits.sigmoid(), batch[name]))
            cross_entropy.append(F.binary_cross_entropy_with_logits(logits, batch[name]))
        return {"dice": dice, "ce": cross_entropy, "mse": [F.mse_loss(output.hierarchy.float(), batch["hierarchy"])]}


class LayoutEncoderStage(ImageStage):
    name = "layout encoder"
    card_template = "layout_encoder.md.jinja"

    def __init__(self, config: Config, context: StageContext):
        super().__init__(config, context)
        self.open_data(functools.partial(PosterDataset, config=config))
        torch.manual_seed(config.seed)
        self.encoder = build_layout_encoder(config.model, config.resolution)
        self.ema_of = {"encoder": self.encoder}
        self.take_initial_weights(self.ema_of)
        self.phase = LayoutEncoderPhase(self.encoder, config, self._role_weights())
        self.phases = [self.phase]

    def _role_weights(self) -> Tensor:
        """Compute the weight of each colour role from its share of the pixels of evenly spaced posters.

        The mean weight of a pixel is 1. K.
        """
        keys = [SampleKey(row, 0) for row in evenly_spaced(len(self.training_set), ROLE_POSTERS)]
        roles = torch.stack([self.training_set[key]["color_role"] for key in keys])
        shares = (torch.bincount(roles.flatten(), minlength=len(COLOR_ROLES)) / roles.numel()).clamp(min=1e-4)
        weights = shares**-self.config.role_balance
        return weights / (weights * shares).sum()

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        output = self.encoder(batch["pixel_values"])
        count = len(batch["pixel_values"])
        losses = sum(sum(terms) for terms in self.phase.losses(output, batch).values())
        sums: dict[str, Any] = {"loss": count * losses, "count": torch.tensor(count)}
        for name in MASKS:
            both, either = mask_overlap(output[name] > 0, batch[name] > 0.5)
            sums |= {f"{name}_both": both, f"{name}_either": either}
        hits, totals = class_hits(output.color_role.argmax(1), batch["color_role"], len(COLOR_ROLES))
        for role, hit, total in zip(COLOR_ROLES, hits, totals, strict=True):
            sums |= {f"{role}_hit": hit, f"{role}_total": total}
        sums["hierarchy"] = (output.hierarchy - batch["hierarchy"]).square().flatten(1).mean(1).sum()
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        hits, totals = ([sums[f"{role}_{what}"] for role in COLOR_ROLES] for what in ("hit", "total"))
        return {
            "val_loss": sums["loss"] / sums["count"],
            "val_text_iou": sums["text_mask_both"] / max(sums["text_mask_either"], 1),
            "val_image_iou": sums["image_mask_both"] / max(sums["image_mask_either"], 1),
            "val_color_accuracy": mean_class_accuracy(hits, totals),
            "val_hierarchy_mse": sums["hierarchy"] / sums["count"],
        }

    def previews(self, exchange: Exchange) -> Previews:
        cells = self.shown(exchange, self._preview_cells, PREVIEWS)
        return Previews([image for image, _ in cells], [caption for _, caption in cells], columns=4)

    def _preview_cells(self, batch: Batch, rows: Sequence[int]) -> list[tuple[Image.Image, str]]:
        """Return each poster with its target and predicted features and their differences, with captions."""
        from pipelines.common.layout_pictures import draw_errors, draw_features

        predictions = self.encoder(batch["pixel_values"]).f_tensor().cpu().numpy()
        masks = [batch[name] for name in MASKS]
        targets = torch.cat([*masks, batch["color_role"][:, None].float(), batch["hierarchy"]], 1).cpu().numpy()
        cells = []
        for poster, target, predicted in zip(batch["pixel_values"], targets, predictions, strict=True):
            error, share = draw_errors(predicted, target)
            images = [to_pil(poster), draw_features(target), draw_features(predicted), error]
            captions = ["poster", "target features", "predicted features", f"errors: {share:.1%} of the pixels"]
            cells += list(zip(images, captions, strict=True))
        return cells

    def pipeline(self):
        from pipelines.layout_analysis import LayoutAnalysisPipeline

        return LayoutAnalysisPipeline(encoder=self.encoder)


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(LayoutEncoderStage, config)


if __name__ == "__main__":
    entry_point(main)
