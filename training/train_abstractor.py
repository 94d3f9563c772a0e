"""Train the grammar abstractor: a poster's feature tensor → its design grammar (8 numbers) and its counts.

    accelerate launch training/train_abstractor.py                        # small posters, made for you
    accelerate launch training/train_abstractor.py --config configs/experiments/posters/abstractor_small.yaml
    accelerate launch training/train_abstractor.py --dataset_name data/posters_256 --resolution 256 \\
        --encoder runs/encoder --output_dir runs/mine

With `--encoder`, it also trains on the features that this layout encoder predicts, and its pipeline takes images of
posters. Run the same command again to resume the run.
"""

# Shapes: B batch, C feature channels, H W pixels, N grammar numbers.

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.common.poster_domain import COLOR_ROLES, COUNTS, GRAMMAR
from pipelines.tools.cli import entry_point
from training.core.draws import Draws
from training.core.exchange import Exchange
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, Phase, StageContext
from training.data.fingerprints import module_fingerprint
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

    output_dir: str = option("runs/abstractor", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    model: AbstractorConfig = option(AbstractorConfig)
    """The network"""
    encoder: str | None = option(None, content="encoder", essential=True)
    """Layout encoder (run folder, checkpoint, pipeline folder or Hub id) whose predicted features are also used for
    training; if unset, only the true features of the dataset are used"""
    predicted_share: float = option(0.5, on_resume="warn", at_least=0, at_most=1)
    """Fraction of the posters for which the features predicted by --encoder replace the true features; not used
    without --encoder"""
    counts_weight: float = option(0.1, on_resume="warn", at_least=0)
    """Weight of the cross-entropy of the counts, relative to the squared error of the grammar's numbers"""


def true_features(batch: Batch) -> Tensor:
    """Return the features that a perfect encoder would predict. B C H W in [0, 1]."""
    roles = one_hot(batch["color_role"], len(COLOR_ROLES))
    return torch.cat([batch["text_mask"], batch["image_mask"], roles, batch["hierarchy"]], 1)


class AbstractorPhase(Phase):
    """Loss of the abstractor: squared error of the standardized numbers, and cross-entropy of the counts.

    The numbers are standardized because some of them vary a hundred times less than others.
    """

    name = "abstractor"

    def __init__(self, abstractor: Any, config: Config, encoder: Any):
        super().__init__()
        self.abstractor, self.config = abstractor, config
        self.borrow(encoder=encoder)

    def features(self, batch: Batch, predicted: Tensor | None) -> Tensor:
        """Return the features of a batch, B C H W; those of the samples in `predicted` (B, bool) by the encoder."""
        features = true_features(batch)
        if self.encoder is None or predicted is None:
            return features
        with torch.no_grad():
            predictions = self.encoder(batch["pixel_values"]).probabilities()
        return torch.where(predicted[:, None, None, None], predictions, features)

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.abstractor(self.features(batch, draws.uniform("predicted") < self.config.predicted_share))
        numbers = F.mse_loss(output.standardized, self.abstractor.standardize(batch["grammar"]))
        targets = batch["counts"].long().unbind(1)
        counts = torch.stack([F.cross_entropy(x, y) for x, y in zip(output.counts, targets, strict=True)]).mean()
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
        """Compute the mean and standard deviation of each number over the training posters."""
        numbers = np.array([self.training_set.dataset[name] for name in GRAMMAR])
        return {"grammar_mean": numbers.mean(1).tolist(), "grammar_std": (numbers.std(1) + SMALLEST_DEVIATION).tolist()}

    def _prefixes(self) -> dict[str, bool]:
        """Return the prefixes of the validation metrics, and whether each is measured on the encoder's features."""
        return {"val_": False} if self.encoder is None else {"val_": False, "val_predicted_": True}

    def _predict(self, batch: Batch, predicted: bool) -> Any:
        every = torch.ones(len(batch["grammar"]), dtype=torch.bool, device=self.context.device)
        return self.abstractor(self.phase.features(batch, every if predicted else None))

    def inputs(self) -> dict[str, str]:
        encoder = {"encoder": module_fingerprint(self.encoder)} if self.encoder is not None else {}
        return {**super().inputs(), **encoder}

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        sums = {"count": torch.tensor(len(batch["grammar"]))}
        for prefix, predicted in self._prefixes().items():
            output = self._predict(batch, predicted)
            sums |= regression_sums(output.grammar, batch["grammar"], [prefix + name for name in GRAMMAR])
            correct = (output.counted() == batch["counts"].long()).sum(0)
            sums |= {f"{prefix}{name}_right": value for name, value in zip(COUNTS, correct, strict=True)}
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for prefix in self._prefixes():
            errors = regression_metrics(sums, sums["count"], {prefix + name: name for name in GRAMMAR})
            metrics[f"{prefix}r2"] = sum(r2 for _, r2 in errors.values()) / len(errors)
            metrics[f"{prefix}mae"] = sum(mae for mae, _ in errors.values()) / len(errors)
            for name in COUNTS:
                metrics[f"{prefix}{name}_accuracy"] = sums[f"{prefix}{name}_right"] / sums["count"]
            for name, (mae, r2) in errors.items():
                metrics |= {f"{prefix}r2_{name}": r2, f"{prefix}mae_{name}": mae}
        return metrics

    def previews(self, exchange: Exchange) -> Previews:
        def predict(batch: Batch, rows: Sequence[int]) -> Tensor:
            """Return the grammar numbers of posters and those predicted of them. B 2 G."""
            return torch.stack([batch["grammar"], self._predict(batch, self.encoder is not None).grammar], 1).cpu()

        targets, predictions = torch.stack(self.shown(exchange, predict, PREVIEW_POSTERS)).unbind(1)
        source = "the features predicted by the encoder" if self.encoder is not None else "the true features"
        plots = scatter_plots(targets.numpy(), predictions.numpy(), GRAMMAR)
        return Previews([plots], [f"grammar numbers predicted from {source}, against their targets"], columns=1)

    def pipeline(self):
        from pipelines.layout_analysis import LayoutAnalysisPipeline

        return LayoutAnalysisPipeline(encoder=self.encoder, abstractor=self.abstractor)


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(AbstractorStage, config)


if __name__ == "__main__":
    entry_point(main)
