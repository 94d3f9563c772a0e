"""The building blocks of the training scripts as functions, for notebooks; see docs/api.md."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.tools.cli import UserError
from pipelines.tools.devices import get_device
from pipelines.tools.resources import find_file
from training.core.batches import to_device
from training.core.draws import NEWEST, draws_class
from training.core.parsing import parse_config
from training.core.stage import Batch, MapDataset, Stage, StageContext
from training.engine import optimizers
from training.engine.prepare import make_missing
from training.engine.run_config import RunConfig
from training.engine.weights import freeze_parameters
from training.experiments.registry import config_class, stage_class, stage_of
from training.metrics.memorization import check_memorization, compute_sample_similarity

__all__ = [
    "build_dataset",
    "build_loss",
    "build_model",
    "build_optimizer",
    "check_memorization",
    "compute_sample_similarity",
    "get_device",
    "load_config",
    "set_deterministic",
]


def set_deterministic(seed: int = 0) -> None:
    """Seed the global random generators of Python, NumPy and torch, and make torch use deterministic kernels.

    A stage does not need this for its own random numbers, which are functions of (seed, step, position); it makes
    dropout and the rest of a notebook repeatable. Operations without a deterministic kernel emit a warning.
    """
    from accelerate.utils import set_seed

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def load_config(path: str | Path, stage: str | None = None, **overrides: Any) -> RunConfig:
    """Return the validated config of a stage, read in the same way as by its training script.

    Args:
        path: a YAML file, a run folder (its config.yaml is read), or the name of a preset that comes with Halftone
            (`latent_diffusion/quickstart`).
        stage: `autoencoder`, `latent_diffusion`, …; None selects the stage that the file belongs to (`stage_of`).
        overrides: values that replace those of the file, named like the flags; a name with a dot is given as
            `**{"model.dropout": 0.1}`.

    Raises:
        UserError: if the file does not exist, a key is unknown or a value is invalid.
    """
    file = Path(path) / "config.yaml" if Path(path).is_dir() else find_file(path)
    words = ["--config", str(file)]
    for name, value in overrides.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return parse_config(config_class(stage or stage_of(file)), words)


def build_model(config: RunConfig) -> nn.Module:
    """Return the module of the stage's first phase on `get_device()`, with the weights that a run starts from.

    Its children are the trained models, for example `build_model(config).unet`; the frozen models it uses are not among
    them. Missing inputs that the config's `prepare` can make are made first. Calling the function again with the same
    config object returns the same module.
    """
    return _stage(config).phases[0]


def build_dataset(config: RunConfig, split: str = "train") -> MapDataset:
    """Return a dataset of the stage: `dataset[SampleKey(row, key)]` is a sample, `dataset.collate(samples)` a batch.

    Args:
        split: "train" or "validation".

    Raises:
        UserError: if `split` is neither of them, or if the stage has no validation data.
    """
    if split not in ("train", "validation"):
        raise UserError(f"split is '{split}'; choose train or validation")
    data = _stage(config).train_data() if split == "train" else _stage(config).validation_data()
    if data is None:
        raise UserError("the config leaves no validation data; raise --validation_fraction")
    return data


def build_loss(config: RunConfig) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """Return a function `loss(batch, step=0)` that computes the scalar loss and the detached metrics of a batch.

    Noise, timesteps and dropped conditions are those that a run on one process uses at this step, so the first loss
    equals the run's first loss.
    """
    stage = _stage(config)

    def loss(batch: Batch, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(stage.phases[0].parameters()).device
        draws = draws_class(NEWEST)(config.seed, step, range(len(batch["index"])), device)
        return stage.phases[0](to_device(batch, device), draws)

    return loss


def build_optimizer(config: RunConfig, parameters: nn.Module | Iterable[nn.Parameter]):
    """Return the configured optimizer for the given parameters, or for those of a module that require gradients."""
    if isinstance(parameters, nn.Module):
        parameters = [p for p in parameters.parameters() if p.requires_grad]
    return optimizers.build_optimizer(config, parameters, config.learning_rate)


_stages: dict[int, Stage] = {}
"""Stages by the `id` of their config; an entry is removed when its config is garbage collected."""


def _stage(config: RunConfig) -> Stage:
    """Return the stage of this config object; it is built on first use."""
    if id(config) not in _stages:
        make_missing(config.recipes(), lambda: None)
        script = type(config).__module__.rsplit(".", 1)[-1]
        stage = stage_class(script)(config, StageContext(get_device()))  # type: ignore[call-arg, arg-type]
        freeze_parameters(stage, config.freeze_parameters)
        for module in stage.frozen:
            module.requires_grad_(False).eval()
        for module in (*stage.frozen, *stage.phases):
            module.to(get_device())
        _stages[id(config)] = stage
        weakref.finalize(config, _stages.pop, id(config), None)
    return _stages[id(config)]
