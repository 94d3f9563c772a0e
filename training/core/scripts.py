"""Finds the training scripts, and those that know the keys of a config file.

Scripts are imported by name, and only when they are needed: they are in a higher layer, and slow to import.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.tools.cli import UserError, nearest
from pipelines.tools.commands import command
from pipelines.tools.resources import find_file
from training.core.parsing import known_names
from training.core.settings import read_merged_settings

FOLDER = Path(__file__).resolve().parent.parent
PREFIX = "train_"
OTHER_PREFIXES = ("distill_", "finetune_")
"""A script that trains further what a stage has trained; the name of its stage is the whole name of the script."""


def stage_names() -> list[str]:
    """Return the names of all stages: `autoencoder` for train_autoencoder.py, `finetune_decoder`, and so on."""
    files = [path for prefix in (PREFIX, *OTHER_PREFIXES) for path in FOLDER.glob(f"{prefix}*.py")]
    return sorted(path.stem.removeprefix(PREFIX) for path in files)


def script_path(stage: str) -> Path:
    """Return the training script of a stage."""
    return FOLDER / f"{'' if stage.startswith(OTHER_PREFIXES) else PREFIX}{stage}.py"


def script_module(stage: str) -> ModuleType:
    """Import the training script of a stage.

    Raises:
        UserError: if the stage does not exist.
    """
    name, known = Path(stage).stem.removeprefix(PREFIX), stage_names()
    if name not in known:
        raise UserError(f"unknown stage '{stage}'{nearest(name, known)}; choose from {', '.join(known)}")
    return importlib.import_module(f"training.{script_path(name).stem}")


def unknown_keys(keys: list[str]) -> dict[str, list[str]]:
    """Return for each stage the keys that its script does not know."""
    known = {stage: known_names(script_module(stage).Config) for stage in stage_names()}
    return {stage: [key for key in keys if key not in names] for stage, names in known.items()}


def dotted(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the keys of settings; those of a group are `group.key`."""
    keys = []
    for name, value in values.items():
        if isinstance(value, Mapping) and name != "prepare":  # the keys of `prepare` are paths
            keys += dotted(value, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def file_of_another_script(file: str, known: list[str]) -> str | None:
    """Return the message for a config file with keys that are not in `known`, but that another script knows.

    None if all keys are known here, or no script knows all of them.
    """
    keys = dotted(read_merged_settings(find_file(file)))
    if all(key in known for key in keys):
        return None
    scripts = [f"training/{script_path(stage).name}" for stage, missing in unknown_keys(keys).items() if not missing]
    if not scripts:
        return None
    names = " or ".join(Path(script).name for script in scripts)
    return f"{file} is for {names}; run `{command(f'{scripts[0]} --config {file}')}`"
