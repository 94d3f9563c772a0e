"""Train the abstractor: a poster's feature tensor → its design grammar (8 numbers) and its counts.

    accelerate launch training/train_abstractor.py                        # small posters, made for you
    accelerate launch training/train_abstractor.py --config configs/experiments/posters/abstractor_small.yaml
    accelerate launch training/train_abstractor.py --dataset_name data/posters_256 --resolution 256 \\
        --encoder runs/encoder --output_dir runs/mine

With `--encoder` it learns from what that encoder reads as well, and its pipeline goes from pictures to numbers.
Typed again, a command goes on where the run stood.
B batch, C feature channels, H W pixels, N grammar numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.common.poster_domain import COLOR_ROLES, COUNTS, GRAMMAR
from pipelines.tools.cli import entry_point
from training.core.draws import Draws
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, Phase, StageContext
from training.data.posters import PosterDataConfig, PosterDataset
from training.engine.session import train
from training.engine.weights import load_component
from training.metrics.regression import regression_metrics, regression_sums, scatter_plots
from training.models.posters import AbstractorConfig, build_abstractor
from training.objectives.segmentation import one_hot
from training.stages.image_stage import ImageStage, ImageStageConfig

PRESET = "configs/experiments/posters/abstractor_tiny.yaml"
PREVIEW_POSTERS = 256
SMALLEST_DEVIATION = 1e-3


@dataclass
class Config(ImageStageConfig, PosterDataConfig):
    """Flags of train_abstractor.py."""

    output_dir: str = option("runs/abstractor", on_resume="free")
    """The run folder"""
    model: AbstractorConfig = option(AbstractorConfig)
    """The network"""
    encoder: str | None = option(None)
    """A layout encoder (run, checkpoint, pipeline or Hub id) whose predictions are trained on as well"""
    predicted_share: float = option(0.5, on_resume="warn", at_least=0, at_most=1)
    """With an encoder: the share of posters whose features are its predictions; the others have the true features"""
    counts_weight: float = option(0.1, on_resume="warn", at_least=0)
    """Weight of the counts' cross-entropy beside the numbers' squared error"""


def true_features(batch: Batch) -> Tensor:
    """What a perfect encoder would read. B C H W in [0, 1]."""
    roles = one_hot(batch["color_role"], len(COLOR_ROLES))
    return torch.cat([batch["text_mask"], batch["image_mask"], roles, batch["hierarchy"]], 1)


class AbstractorPhase(Phase):
    """Squared error of the numbers, in units of their own deviation (some vary a hundred times less than others), and
    cross-entropy of the counts."""

    name = "abstractor"

    def __init__(self, abstractor: Any, config: Config, encoder: Any):
        super().__init__()
        self.abstractor, self.config = abstractor, config
        self.borrow(encoder=encoder)

    def features(self, batch: Batch, predicted: Tensor) -> Tensor:
        """B C H W; `predicted`: B, bool, whose features are the encoder's."""
        features = true_features(batch)
        if self.encoder is None or not predicted.any():
            return features
        with torch.no_grad():
            read = self.encoder(batch["pixel_values"]).probabilities()
        return torch.where(predicted[:, None, None, None], read, features)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        said = self.abstractor(self.features(batch, draws.uniform("predicted") < self.config.predicted_share))
        numbers = F.mse_loss(said.standardized, self.abstractor.standardize(batch["grammar"]))
        counted = batch["counts"].long().unbind(1)
        counts = torch.stack([F.cross_entropy(x, y) for x, y in zip(said.counts, counted, strict=True)]).mean()
        metrics = {"grammar_loss": numbers.detach(), "counts_ce": counts.detach()}
        return numbers + self.config.counts_weight * counts, metrics


class AbstractorStage(ImageStage):
    name = "grammar abstractor"
    card_template = "grammar_abstractor.md.jinja"
    best_metric, best_is_lower = "val_r2", False

    def __init__(self, config: Config, context: StageContext):
        super().__init__(config, context)
        self.open_data(functools.partial(PosterDataset, config=config, numbers=True))
        self.encoder = load_component(config.encoder, "encoder", "--encoder") if config.encoder else None
        torch.manual_seed(config.seed)
        self.abstractor = build_abstractor(config.model, **self._grammar_scale())
        self.ema_of = {"abstractor": self.abstractor}
        self.take_initial_weights(self.ema_of)
        self.phase = AbstractorPhase(self.abstractor, config, self.encoder)
        self.phases = [self.phase]
        self.frozen = [self.encoder] if self.encoder is not None else []

    def _grammar_scale(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each number over the training posters."""
        numbers = np.array([self.training_set.dataset[name] for name in GRAMMAR])
        return {"grammar_mean": numbers.mean(1).tolist(), "grammar_std": (numbers.std(1) + SMALLEST_DEVIATION).tolist()}

    def _readings(self) -> dict[str, bool]:
        """How validation names its figures, and whether the features are then the encoder's."""
        return {"val_": False} if self.encoder is None else {"val_": False, "val_predicted_": True}

    def _say(self, batch: Batch, predicted: bool) -> Any:
        count = len(batch["grammar"])
        return self.abstractor(self.phase.features(batch, torch.full((count,), predicted, device=self.context.device)))

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        sums = {"count": torch.tensor(len(batch["grammar"]))}
        for prefix, predicted in self._readings().items():
            said = self._say(batch, predicted)
            sums |= regression_sums(said.grammar, batch["grammar"], [prefix + name for name in GRAMMAR])
            right = (said.counted() == batch["counts"].long()).sum(0)
            sums |= {f"{prefix}{name}_right": value for name, value in zip(COUNTS, right, strict=True)}
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for prefix in self._readings():
            figures = regression_metrics(sums, sums["count"], {prefix + name: name for name in GRAMMAR})
            found[f"{prefix}r2"] = sum(r2 for _, r2 in figures.values()) / len(figures)
            found[f"{prefix}mae"] = sum(mae for mae, _ in figures.values()) / len(figures)
            for name in COUNTS:
                found[f"{prefix}{name}_accuracy"] = sums[f"{prefix}{name}_right"] / sums["count"]
            for name, (mae, r2) in figures.items():
                found |= {f"{prefix}r2_{name}": r2, f"{prefix}mae_{name}": mae}
        return found

    def previews(self) -> Previews:
        true, said = [], []
        rows = self.shown_rows(PREVIEW_POSTERS)
        for start in range(0, len(rows), 32):
            self.context.poll()
            batch = self.shown_batch(rows[start : start + 32])
            true.append(batch["grammar"].cpu())
            said.append(self._say(batch, self.encoder is not None).grammar.cpu())
        words = "read from the picture by the encoder" if self.encoder is not None else "read from the true features"
        plots = scatter_plots(torch.cat(true).numpy(), torch.cat(said).numpy(), GRAMMAR)
        return Previews([plots], [f"the grammar's numbers, {words}, against the true ones"], columns=1)

    def pipeline(self):
        from pipelines.layout_analysis import LayoutAnalysisPipeline

        return LayoutAnalysisPipeline(encoder=self.encoder, abstractor=self.abstractor)


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(AbstractorStage, config)


if __name__ == "__main__":
    entry_point(main)
