"""Starting from the weights of another run, building on its models, and keeping parts of one as they are."""

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
    """Which parameters are not trained."""

    freeze_parameters: list[str] = option([])
    """Patterns of parameters that keep their values, e.g. '[unet.down_blocks.*]'; names are the pipeline's."""


def load_initial_weights(path: str, modules: Mapping[str, nn.Module], flag: str = "--init_from") -> None:
    """Copy the components of the pipeline at `path` (run, checkpoint, folder or Hub id) into modules of the same names.

    Raises:
        UserError: no such component, or weights of another shape; `flag` is what named them.
    """
    from pipelines.tools.loading import load_pipeline

    components = load_pipeline(path).components
    for name, module in modules.items():
        source = components.get(name)
        if source is None:
            raise UserError(f"{flag} {path} has no {name}; it holds {', '.join(k for k, v in components.items() if v)}")
        try:
            module.load_state_dict(source.state_dict())
        except RuntimeError as error:
            first = next((line for line in str(error).splitlines()[1:] if line.strip()), str(error)).strip()
            raise UserError(
                f"{flag} {path}: its {name} is another model than the one configured ({first}); "
                "make the settings of the model equal, e.g. with --config and the config.yaml of its run"
            ) from None
    logger.info("weights of %s taken from %s", ", ".join(modules), path)


def load_component(path: str, name: str, flag: str) -> Any:
    """The component `name` of the pipeline at `path` (run, checkpoint, folder or Hub id), frozen and in eval mode.

    Raises:
        UserError: no pipeline there, or none with such a component; `flag` is what named it.
    """
    from pipelines.tools.loading import load_pipeline

    components = load_pipeline(path).components
    if components.get(name) is None:
        has = ", ".join(key for key, value in components.items() if value is not None)
        raise UserError(f"{flag} {path} has no {name} (it holds {has}); name a run that trained one")
    return components[name].requires_grad_(False).eval()


def freeze_parameters(stage: Stage, patterns: Sequence[str]) -> None:
    """Keep the parameters that match one of the shell-style `patterns` as they are, from now on.

    Names are those of the stage's components in its pipeline: `unet.down_blocks.0.resnets.0.conv1.weight`. They are
    given to no optimizer, so neither updates nor weight decay move them.

    Raises:
        UserError: a pattern that matches nothing, or a phase with nothing left to train.
    """
    named = {f"{name}.{key}": p for name, module in stage.ema_of.items() for key, p in module.named_parameters()}
    for pattern in patterns:
        matched = fnmatch.filter(named, pattern)
        if not matched:
            modules = {key.rsplit(".", depth)[0] + ".*" for key in named for depth in range(1, key.count(".") + 1)}
            raise UserError(
                f"--freeze_parameters: '{pattern}' matches none of the {len(named)} parameters"
                f"{nearest(pattern, modules)} (they begin with {', '.join(stage.ema_of)}; as in 'unet.down_blocks.*')"
            )
        for key in matched:
            named[key].requires_grad_(False)
    if not patterns:
        return
    for phase in stage.phases:
        if not any(p.requires_grad for p in phase.parameters()):
            raise UserError(f"--freeze_parameters {list(patterns)} leaves nothing to train in phase '{phase.name}'")
    frozen = sum(p.numel() for p in named.values() if not p.requires_grad)
    logger.info("%s of %s parameters stay as they are", f"{frozen:,}", f"{sum(p.numel() for p in named.values()):,}")
