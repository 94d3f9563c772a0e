"""Train the layout encoder: a poster's picture → its feature tensor (text, pictures, colour roles, hierarchy).

    accelerate launch training/train_encoder.py                           # small posters, made for you
    accelerate launch training/train_encoder.py --config configs/experiments/posters/encoder_small.yaml
    accelerate launch training/train_encoder.py --dataset_name data/posters_256 --resolution 256 --output_dir runs/mine

Typed again, a command goes on where the run stood.
B batch, H W pixels, K colour roles.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.common.poster_domain import COLOR_ROLES
from pipelines.tools.cli import UserError, entry_point
from training.core.draws import Draws, SampleKey
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

    output_dir: str = option("runs/encoder", on_resume="free")
    """The run folder"""
    model: LayoutEncoderConfig = option(LayoutEncoderConfig)
    """The network"""
    dice_weight: float = option(1.0, on_resume="warn", at_least=0)
    """Weight of the Dice losses of masks and colour roles"""
    ce_weight: float = option(1.0, on_resume="warn", at_least=0)
    """Weight of the cross-entropies of masks and colour roles"""
    mse_weight: float = option(5.0, on_resume="warn", at_least=0)
    """Weight of the hierarchy's squared error"""
    role_balance: float = option(0.5, on_resume="warn", at_least=0)
    """How much more rare colour roles count in the cross-entropy: their share of pixels to the power of minus this"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not (self.dice_weight or self.ce_weight or self.mse_weight):
            raise UserError("nothing to learn from: one of --dice_weight, --ce_weight, --mse_weight must be above 0")
        self.model.check_resolution(self.resolution)


class LayoutEncoderPhase(Phase):
    """Dice and cross-entropy of what is a class, squared error of what is a number."""

    name = "encoder"

    role_weights: Tensor

    def __init__(self, encoder: Any, config: Config, role_weights: Tensor):
        super().__init__()
        self.encoder, self.config = encoder, config
        self.register_buffer("role_weights", role_weights, persistent=False)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config, found = self.config, self.encoder(batch["pixel_values"])
        metrics = {name: torch.stack(losses).sum() for name, losses in self.losses(found, batch).items()}
        weights = {"dice": config.dice_weight, "ce": config.ce_weight, "mse": config.mse_weight}
        loss = torch.stack([weights[name] * value for name, value in metrics.items()]).sum()
        return loss, {name: value.detach() for name, value in metrics.items()}

    def losses(self, found: Any, batch: Batch) -> dict[str, list[Tensor]]:
        """The terms of each kind, one for each head that has it."""
        role, true_role = found.color_role.float(), batch["color_role"]
        dice = [dice_loss(role.softmax(1), one_hot(true_role, role.shape[1]))]
        # The weighted mean that PyTorch offers would make a sample's share hang on the others of its micro-batch.
        cross_entropy = [(self.role_weights[true_role] * F.cross_entropy(role, true_role, reduction="none")).mean()]
        for name in MASKS:
            logits = found[name].float()
            dice.append(dice_loss(logits.sigmoid(), batch[name]))
            cross_entropy.append(F.binary_cross_entropy_with_logits(logits, batch[name]))
        return {"dice": dice, "ce": cross_entropy, "mse": [F.mse_loss(found.hierarchy.float(), batch["hierarchy"])]}


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
        """The weight of each colour role, by its share of the pixels of evenly spaced posters; 1 on average. K."""
        keys = [SampleKey(row, 0) for row in evenly_spaced(len(self.training_set), ROLE_POSTERS)]
        roles = torch.stack([self.training_set[key]["color_role"] for key in keys])
        shares = (torch.bincount(roles.flatten(), minlength=len(COLOR_ROLES)) / roles.numel()).clamp(min=1e-4)
        weights = shares**-self.config.role_balance
        return weights / (weights * shares).sum()

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        found = self.encoder(batch["pixel_values"])
        count = len(batch["pixel_values"])
        losses = sum(sum(terms) for terms in self.phase.losses(found, batch).values())
        sums: dict[str, Any] = {"loss": count * losses, "count": torch.tensor(count)}
        for name in MASKS:
            both, either = mask_overlap(found[name] > 0, batch[name] > 0.5)
            sums |= {f"{name}_both": both, f"{name}_either": either}
        hits, totals = class_hits(found.color_role.argmax(1), batch["color_role"], len(COLOR_ROLES))
        for role, hit, total in zip(COLOR_ROLES, hits, totals, strict=True):
            sums |= {f"{role}_hit": hit, f"{role}_total": total}
        sums["hierarchy"] = (found.hierarchy - batch["hierarchy"]).square().flatten(1).mean(1).sum()
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

    def previews(self) -> Previews:
        from pipelines.common.layout_pictures import draw_errors, draw_features

        batch = self.shown_batch(self.shown_rows(PREVIEWS))
        predictions = self.encoder(batch["pixel_values"]).f_tensor().cpu().numpy()
        masks = [batch[name] for name in MASKS]
        targets = torch.cat([*masks, batch["color_role"][:, None].float(), batch["hierarchy"]], 1).cpu().numpy()
        images, captions = [], []
        for poster, true, predicted in zip(batch["pixel_values"], targets, predictions, strict=True):
            error, share = draw_errors(predicted, true)
            images += [to_pil(poster), draw_features(true), draw_features(predicted), error]
            captions += ["poster", "its features", "as the encoder reads it", f"wrong in {share:.1%} of the pixels"]
        return Previews(images, captions, columns=4)

    def pipeline(self):
        from pipelines.layout_analysis import LayoutAnalysisPipeline

        return LayoutAnalysisPipeline(encoder=self.encoder)


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(LayoutEncoderStage, config)


if __name__ == "__main__":
    entry_point(main)
