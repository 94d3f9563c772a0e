"""Starting from the weights of another run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from pipelines.cli import UserError

logger = logging.getLogger("halftone")


def load_initial_weights(path: str, modules: Mapping[str, nn.Module]) -> None:
    """Copy the components of the pipeline at `path` (run, checkpoint, folder or Hub id) into modules of the same names.

    Raises:
        UserError: no such component, or weights of another shape.
    """
    from pipelines.loading import load_pipeline

    components = load_pipeline(path).components
    for name, module in modules.items():
        source = components.get(name)
        if source is None:
            raise UserError(
                f"--init_from {path} has no {name}; it holds {', '.join(k for k, v in components.items() if v)}"
            )
        try:
            module.load_state_dict(source.state_dict())
        except RuntimeError as error:
            first = next((line for line in str(error).splitlines()[1:] if line.strip()), str(error)).strip()
            raise UserError(
                f"--init_from {path}: its {name} is another model than the one configured ({first}); "
                "make the --model settings equal"
            ) from None
    logger.info("weights of %s taken from %s", ", ".join(modules), path)
