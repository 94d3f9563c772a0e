"""What the training scripts use, by seven names, for notebooks: see docs/api.md.

B batch.
"""

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
from training.core.draws import Draws
from training.core.parsing import parse_config
from training.core.stage import Batch, MapDataset, Stage, StageContext
from training.engine import optimizers
from training.engine.prepare import make_missing
from training.engine.run_config import RunConfig
from training.engine.weights import freeze_parameters
from training.experiments.registry import config_class, stage_class, stage_of

__all__ = [
    "build_dataset",
    "build_loss",
    "build_model",
    "build_optimizer",
    "get_device",
    "load_config",
    "set_deterministic",
]


def set_deterministic(seed: int = 0) -> None:
    """Seed the global generators of Python, NumPy and torch, and have torch take deterministic kernels.

    A stage needs none of it for its own draws, which are functions of (seed, step, position): it is for the rest of a
    notebook, and for dropout. Operations without a deterministic kernel warn.
    """
    from accelerate.utils import set_seed

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def load_config(path: str | Path, stage: str | None = None, **overrides: Any) -> RunConfig:
    """The checked config of any stage, as its script reads it.

    Args:
        path: a YAML file, or a run folder (its config.yaml), or the name of a preset that comes with Halftone
            (`latent_diffusion/quickstart`).
        stage: `autoencoder`, `latent_diffusion`, …; None takes the one that the file belongs to (`scripts.stage_of`).
        overrides: in place of what the file says, named as the flags are; those with a dot as
            `**{"model.dropout": 0.1}`.

    Raises:
        UserError: no such file, an unknown key, or a value that cannot be.
    """
    file = Path(path) / "config.yaml" if Path(path).is_dir() else find_file(path)
    words = ["--config", str(file)]
    for name, value in overrides.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return parse_config(config_class(stage or stage_of(file)), words)


def build_model(config: RunConfig) -> nn.Module:
    """The stage's first phase on `get_device()`, with the weights a run begins with.

    Its children are the models: `build_model(config).unet`. Frozen models that it uses are not among them. Inputs that
    the config's `prepare` can make are made; the same config gives the same object each time.
    """
    return _stage(config).phases[0]


def build_dataset(config: RunConfig, split: str = "train") -> MapDataset:
    """The stage's data: `dataset[SampleKey(row, key)]` is a sample, `dataset.collate(samples)` a batch.

    Args:
        split: "train", or "validation" (an error where the stage has none).
    """
    if split not in ("train", "validation"):
        raise UserError(f"split is '{split}'; choose train or validation")
    data = _stage(config).train_data() if split == "train" else _stage(config).validation_data()
    if data is None:
        raise UserError("there are no validation data; raise --validation_fraction")
    return data


def build_loss(config: RunConfig) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """`loss(batch, step=0)`: the scalar loss of a batch of `build_dataset` in this step, and detached metrics.

    Noise, timesteps and dropped conditions are those that a run on one process has for this step, so the first loss is
    the run's first loss.
    """
    stage = _stage(config)

    def loss(batch: Batch, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(stage.phases[0].parameters()).device
        draws = Draws(config.seed, step, range(len(batch["index"])), device)
        return stage.phases[0](to_device(batch, device), draws)

    return loss


def build_optimizer(config: RunConfig, parameters: nn.Module | Iterable[nn.Parameter]):
    """The configured optimizer at `learning_rate`: over what requires gradients in a module, or what is given."""
    if isinstance(parameters, nn.Module):
        parameters = [p for p in parameters.parameters() if p.requires_grad]
    return optimizers.build_optimizer(config, parameters, config.learning_rate)


_stages: dict[int, Stage] = {}
"""By the identity of their config; an entry goes with its config."""


def _stage(config: RunConfig) -> Stage:
    """The stage of this very config object, built at first use."""
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
