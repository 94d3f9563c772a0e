"""Which metric decides about the best checkpoint and early stopping."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.tools.cli import UserError
from training.core.stage import Stage
from training.engine.cadence import Cadence, CadenceConfig
from training.run.state import EarlyStoppingConfig

_HIGHER_IS_BETTER = ("psnr", "ssim", "r2", "iou", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class BestMetric:
    """A metric by the name that it has in metrics.csv."""

    name: str
    lower_is_better: bool


def check_evaluations(stage: Stage, config: CadenceConfig) -> None:
    """Check that generated images are measured only where there are some.

    Raises:
        UserError: measurements are requested, and the stage generates no images.
    """
    for name in ("evaluation_epochs", "evaluation_steps", "memorization_epochs"):
        if getattr(config, name) and not generates_images(stage):
            raise UserError(f"--{name}: this stage ({stage.name}) generates no images to measure; set it to 0")


def generates_images(stage: Stage) -> bool:
    """Return whether the stage generates images that can be measured."""
    return type(stage).evaluate is not Stage.evaluate


def best_metric(stage: Stage, config: EarlyStoppingConfig, cadence: Cadence) -> BestMetric:
    """Return the metric that `--best_metric` names.

    Raises:
        UserError: it is one of generated images, which this run does not measure.
    """
    chosen = config.best_metric
    generates = generates_images(stage)
    if chosen == "auto":
        if not (cadence.evaluates and generates) or stage.best_metric.startswith("eval_"):
            return BestMetric(stage.best_metric, stage.best_is_lower)
        chosen = "kid"
    if chosen.startswith("val_"):
        is_usual = chosen == stage.best_metric
        return BestMetric(chosen, stage.best_is_lower if is_usual else not chosen.endswith(_HIGHER_IS_BETTER))
    if not generates:
        raise UserError(
            f"--best_metric {chosen}: this stage generates no images; use auto, or a validation metric such as "
            f"{stage.best_metric}"
        )
    if not cadence.evaluates:
        raise UserError(f"--best_metric {chosen} needs measurements during the run; add --evaluation_epochs 1")
    name = f"eval_{chosen.removeprefix('eval_')}"
    return BestMetric(name, not name.endswith(_HIGHER_IS_BETTER))
