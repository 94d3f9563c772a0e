"""Initial weights from another run, components of other runs, and frozen parameters."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from pipelines.tools.cli import UserError, nearest
from training.core.options import Options, option

if TYPE_CHECKING:
    from training.core.stage import Stage

logger = logging.getLogger("halftone")


@dataclass
class FreezeConfig(Options):
    """Options for parameters that are not trained."""

    freeze_parameters: list[str] = option([])
    """Glob patterns of the parameters to freeze, as component.parameter, e.g. '[unet.down_blocks.*]'"""


def load_initial_weights(path: str, modules: Mapping[str, nn.Module], flag: str = "--init_from") -> None:
    """Load the weights of the pipeline at `path` into the modules, which have the names of its components.

    Args:
        path: a run, a checkpoint, a pipeline folder or a Hub id.
        flag: the flag that `path` comes from, for error messages.

    Raises:
        UserError: the pipeline lacks a component, or its weights have other names or shapes.
    """
    from pipelines.tools.loading import load_pipeline

    components = load_pipeline(path).components
    for name, module in modules.items():
        source = components.get(name)
        if source is None:
            raise UserError(
                f"{flag} {path} has no {name} (it has {', '.join(k for k, v in components.items() if v)}); "
                "name a run that trained one"
            )
        try:
            module.load_state_dict(source.state_dict())
        except RuntimeError as error:
            first = next((line for line in str(error).splitlines()[1:] if line.strip()), str(error)).strip()
            raise UserError(
                f"{flag} {path}: its {name} differs from the configured model ({first}); "
                "use the same model settings, e.g. with --config and the config.yaml of its run"
            ) from None
    logger.info("initial weights of %s loaded from %s", ", ".join(modules), path)


def load_component(path: str, name: str, flag: str) -> Any:
    """Load the component `name` of the pipeline at `path`; return it frozen and in eval mode.

    Args:
        path: a run, a checkpoint, a pipeline folder or a Hub id.
        flag: the flag that `path` comes from, for error messages.

    Raises:
        UserError: `path` is not a pipeline, or the pipeline lacks the component.
    """
    from pipelines.tools.loading import load_pipeline

    components = load_pipeline(path).components
    if components.get(name) is None:
        has = ", ".join(key for key, value in components.items() if value is not None)
        raise UserError(f"{flag} {path} has no {name} (it has {has}); name a run that trained one")
    return components[name].requires_grad_(False).eval()


def freeze_parameters(stage: Stage, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match one of the shell-style `patterns`.

    A name begins with the component in the pipeline, as in `unet.down_blocks.0.resnets.0.conv1.weight`. Optimizers do
    not receive these parameters, so neither updates nor weight decay change them.

    Raises:
        UserError: a pattern matches no parameter, or a phase has no trainable parameter left.
    """
    named = {f"{name}.{key}": p for name, module in stage.ema_of.items() for key, p in module.named_parameters()}
    for pattern in patterns:
        matched = fnmatch.filter(named, pattern)
        if not matched:
            modules = {key.rsplit(".", depth)[0] + ".*" for key in named for depth in range(1, key.count(".") + 1)}
            raise UserError(
                f"--freeze_parameters: '{pattern}' matches none of the {len(named)} parameters"
                f"{nearest(pattern, modules)} (names begin with {', '.join(stage.ema_of)}, as in 'unet.down_blocks.*')"
            )
        for key in matched:
            named[key].requires_grad_(False)
    if not patterns:
        return
    for phase in stage.phases:
        if not any(p.requires_grad for p in phase.parameters()):
            raise UserError(
                f"--freeze_parameters {list(patterns)} leaves nothing to train in phase '{phase.name}'; "
                "remove some of the patterns"
            )
    frozen = sum(p.numel() for p in named.values() if not p.requires_grad)
    logger.info("%s of %s parameters are frozen", f"{frozen:,}", f"{sum(p.numel() for p in named.values()):,}")
