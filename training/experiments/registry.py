"""Finds the stage that a config file belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError, nearest
from pipelines.tools.resources import find_file
from training.core.parsing import known_names, without_hub_token
from training.core.scripts import dotted, script_module, unknown_keys
from training.core.settings import read_merged_settings
from training.core.stage import Stage
from training.engine.run_config import RunConfig


def config_class(stage: str) -> type[RunConfig]:
    return script_module(stage).Config


def stage_class(stage: str) -> type[Stage]:
    """Return the Stage subclass that a training script defines."""
    module = script_module(stage)
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    return next(value for value in own if issubclass(value, Stage))


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read the settings of a YAML file, and of its bases: a file of the user's, or one that comes with Halftone.

    Raises:
        UserError: if the file does not exist, is not UTF-8, does not contain a mapping, or contains a token.
    """
    values = read_merged_settings(find_file(path))
    return without_hub_token(values, path)


def stage_of(path: str | Path) -> str:
    """Return the stage that a config file belongs to: the stage whose script knows all of its keys.

    If several scripts do, the stage is taken from the path: from a file name that begins with the name of a stage
    (`encoder_small.yaml`), or else from the nearest folder with such a name (`latent_diffusion/`). The config.yaml of a
    run contains all keys of its stage, so it is never ambiguous.

    Raises:
        UserError: if no script knows all keys, or if several do and the path names none of them.
    """
    unknown = unknown_keys(dotted(read_config_file(path)))
    fitting = [stage for stage, missing in unknown.items() if not missing]
    if len(fitting) == 1:
        return fitting[0]
    placed = _by_place(Path(path), fitting or list(unknown))
    if fitting and placed:
        return placed
    if fitting:
        raise UserError(
            f"{path} could belong to the stages {' or '.join(fitting)}; move it into a folder with the name of its "
            "stage, or begin its file name with that name"
        )
    closest = placed or min(unknown, key=lambda stage: len(unknown[stage]))
    key = unknown[closest][0]
    raise UserError(
        f"unknown key '{key}' in {path}{nearest(key, known_names(config_class(closest)))} (read as a config of the "
        f"stage {closest})"
    )


def _by_place(path: Path, stages: Sequence[str]) -> str | None:
    by_name = [stage for stage in stages if path.name.startswith(stage)]
    folders = [folder.name for folder in path.resolve().parents if folder.name in stages]
    return next(iter(by_name + folders), None)
