"""Starting from the weights of another run, or building on its models."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from pipelines.cli import UserError

logger = logging.getLogger("halftone")


def load_initial_weights(path: str, modules: Mapping[str, nn.Module], flag: str = "--init_from") -> None:
    """Copy the components of the pipeline at `path` (run, checkpoint, folder or Hub id) into modules of the same names.

    Raises:
        UserError: no such component, or weights of another shape; `flag` is what named them.
    """
    from pipelines.loading import load_pipeline

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
                "make the --model.… settings equal, e.g. with --config and the config.yaml of its run"
            ) from None
    logger.info("weights of %s taken from %s", ", ".join(modules), path)


def load_component(path: str, name: str, flag: str) -> Any:
    """The component `name` of the pipeline at `path` (run, checkpoint, folder or Hub id), frozen and in eval mode.

    Raises:
        UserError: no pipeline there, or none with such a component; `flag` is what named it.
    """
    from pipelines.loading import load_pipeline

    components = load_pipeline(path).components
    if components.get(name) is None:
        has = ", ".join(key for key, value in components.items() if value is not None)
        raise UserError(f"{flag} {path} has no {name} (it holds {has}); name a run that trained one")
    return components[name].requires_grad_(False).eval()
