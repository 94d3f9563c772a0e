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

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.common.poster_domain import COLOR_ROLES, COUNTS, GRAMMAR, MAX_PICTURES, MAX_TEXT_BLOCKS
from pipelines.tools.cli import UserError, entry_point
from training.core.batches import fetch, to_device
from training.core.checks import check_at_least, check_deepest_feature_map
from training.core.draws import Draws, SampleKey
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Batch, Phase, Stage
from training.data.checks import require_clean
from training.data.images import load_split
from training.data.posters import PosterDataConfig, PosterDataset
from training.engine.run_config import RunConfig
from training.engine.session import train
from training.engine.weights import load_component, load_initial_weights
from training.metrics.regression import regression_figures, regression_sums, scatter_plots
from training.objectives.segmentation import one_hot
from training.run.folder import has_checkpoint

logger = logging.getLogger("halftone")

PRESET = "configs/experiments/posters/abstractor_tiny.yaml"
PREVIEW_POSTERS = 256
SMALLEST_DEVIATION = 1e-3
LARGEST_COUNTS = {"text_blocks": MAX_TEXT_BLOCKS, "pictures": MAX_PICTURES}


@dataclass
class AbstractorConfig:
    """The model; names are those of GrammarAbstractorModel."""

    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 96, 128])
    """Channels of each level; every level halves the side"""
    hidden_size: int = 512
    """Width of the layers that read the last feature map"""
    sample_size: int = 64
    """Side that features are brought to"""
    patch_size: int = 1
    """Side of the patches of features that the network works on; 2 reads finer features at the same cost"""
    norm_num_groups: int = 8
    """Groups of the group norms"""
    dropout: float = 0.1
    """Before the last layers"""


@dataclass
class Config(RunConfig, PosterDataConfig):
    """Flags of train_abstractor.py."""

    output_dir: str = option("runs/abstractor", on_resume="free")
    """The run folder"""
    model: AbstractorConfig = option(AbstractorConfig)
    """The network"""
    encoder: str | None = option(None)
    """A layout encoder (run, checkpoint, pipeline or Hub id) whose readings are learned from too"""
    predicted_share: float = option(0.5, on_resume="warn")
    """With an encoder: the share of posters taken as it reads them, the others as they truly are"""
    counts_weight: float = option(0.1, on_resume="warn")
    """Weight of the counts' cross-entropy beside the numbers' squared error"""
    init_from: str | None = option(None, on_resume="warn")
    """Start from the weights of a run, checkpoint or pipeline; steps and optimizer start anew"""

    def validate(self) -> None:
        super().validate()
        check_at_least("counts_weight", self.counts_weight, 0)
        check_at_least("model.patch_size", self.model.patch_size, 1)
        if not 0 <= self.predicted_share <= 1:
            raise UserError(f"--predicted_share is {self.predicted_share}; it is a share in [0, 1]")
        if not 0 <= self.model.dropout < 1:
            raise UserError(f"--model.dropout is {self.model.dropout}; it is a share in [0, 1)")
        widths = self.model.block_out_channels
        if not widths or any(w < 1 or w % self.model.norm_num_groups for w in widths):
            raise UserError(
                f"--model.block_out_channels {widths} must be multiples of "
                f"--model.norm_num_groups {self.model.norm_num_groups}"
            )
        first = 2 * self.model.patch_size  # its own level halves the side as well
        check_deepest_feature_map(
            self.model.sample_size, first, len(widths), "--model.block_out_channels", "--model.sample_size"
        )


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


class AbstractorStage(Stage):
    name = "grammar abstractor"
    card_template = "grammar_abstractor.md.jinja"
    best_metric, best_is_lower = "val_r2", False

    def __init__(self, config: Config):
        from pipelines.models.grammar_abstractor import GrammarAbstractorModel

        self.config = config
        self._train = PosterDataset(load_split(config, "train", config.seed), config, numbers=True)
        held_out = load_split(config, "validation", config.seed)
        self._validation = PosterDataset(held_out, config, numbers=True, augment=False) if len(held_out) else None
        for data in filter(None, (self._train, self._validation)):
            require_clean(data, tell=logger.info)
        self.encoder = load_component(config.encoder, "encoder", "--encoder") if config.encoder else None
        torch.manual_seed(config.seed)
        model = config.model
        self.abstractor = GrammarAbstractorModel(
            in_channels=3 + len(COLOR_ROLES),
            block_out_channels=tuple(model.block_out_channels),
            hidden_size=model.hidden_size,
            num_grammar=len(GRAMMAR),
            largest_counts=tuple(LARGEST_COUNTS[name] for name in COUNTS),
            sample_size=model.sample_size,
            norm_num_groups=model.norm_num_groups,
            dropout=model.dropout,
            patch_size=model.patch_size,
            **self._grammar_scale(),
        )
        if config.init_from and not has_checkpoint(config.output_dir):
            load_initial_weights(config.init_from, {"abstractor": self.abstractor})
        self.phase = AbstractorPhase(self.abstractor, config, self.encoder)
        self.phases, self.ema_of = [self.phase], {"abstractor": self.abstractor}
        self.frozen = [self.encoder] if self.encoder is not None else []

    def _grammar_scale(self) -> dict[str, list[float]]:
        """Mean and deviation of each number over the training posters."""
        numbers = np.array([self._train.dataset[name] for name in GRAMMAR])
        return {"grammar_mean": numbers.mean(1).tolist(), "grammar_std": (numbers.std(1) + SMALLEST_DEVIATION).tolist()}

    def train_data(self) -> PosterDataset:
        return self._train

    def validation_data(self) -> PosterDataset | None:
        return self._validation

    def _readings(self) -> dict[str, bool]:
        """How validation names its figures, and whether the features are then the encoder's."""
        return {"val_": False} if self.encoder is None else {"val_": False, "val_predicted_": True}

    def _say(self, batch: Batch, predicted: bool) -> Any:
        count = len(batch["grammar"])
        return self.abstractor(self.phase.features(batch, torch.full((count,), predicted, device=self._device)))

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
            figures = regression_figures(sums, sums["count"], {prefix + name: name for name in GRAMMAR})
            found[f"{prefix}r2"] = sum(r2 for _, r2 in figures.values()) / len(figures)
            found[f"{prefix}mae"] = sum(mae for mae, _ in figures.values()) / len(figures)
            for name in COUNTS:
                found[f"{prefix}{name}_accuracy"] = sums[f"{prefix}{name}_right"] / sums["count"]
            for name, (mae, r2) in figures.items():
                found |= {f"{prefix}r2_{name}": r2, f"{prefix}mae_{name}": mae}
        return found

    def previews(self) -> Previews:
        data, true, said = self._validation or self._train, [], []
        for start in range(0, min(PREVIEW_POSTERS, len(data)), 32):
            self.poll()
            rows = range(start, min(start + 32, len(data)))
            batch = to_device(fetch(data, [SampleKey(i, 0) for i in rows]), self._device)
            true.append(batch["grammar"].cpu())
            said.append(self._say(batch, self.encoder is not None).grammar.cpu())
        words = "read from the picture by the encoder" if self.encoder is not None else "read from the true features"
        plots = scatter_plots(torch.cat(true).numpy(), torch.cat(said).numpy(), GRAMMAR)
        return Previews([plots], [f"the grammar's numbers, {words}, against the true ones"], columns=1)

    def pipeline(self):
        from pipelines.layout_analysis import LayoutAnalysisPipeline

        return LayoutAnalysisPipeline(encoder=self.encoder, abstractor=self.abstractor)

    @property
    def _device(self) -> torch.device:
        return next(self.abstractor.parameters()).device


def main(argv: list[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__, preset=PRESET)
    return train(lambda: AbstractorStage(config), config)


if __name__ == "__main__":
    entry_point(main)
