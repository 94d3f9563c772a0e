"""Commands as the user types them: `python data_scripts/make_posters.py` in a checkout, `halftone data make_posters`
in an installed copy, where the scripts are inside site-packages."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from .resources import IS_CHECKOUT

PROGRAM = "halftone"
SCRIPT_FOLDERS = ("training", "pipelines", "data_scripts")
# The beginning of a script's path -> what replaces it after `halftone`.
_SUBCOMMANDS = {
    "training/train_": "train ",
    "training/": "",
    "pipelines/": "",
    "data_scripts/": "data ",
}
_LAUNCHED = ("training/train_", "training/distill_", "training/evaluate", "data_scripts/precompute_latents")


def subcommand(script: str) -> str:
    """Return the subcommand of a script: `train autoencoder` for `training/train_autoencoder.py`."""
    name = script.removesuffix(".py")
    beginning = next(beginning for beginning in _SUBCOMMANDS if name.startswith(beginning))
    return _SUBCOMMANDS[beginning] + name.removeprefix(beginning)


def is_launched(script: str) -> bool:
    """Return whether a script, given by its path in the repository, can run as several processes."""
    return script.startswith(_LAUNCHED)


def command(script: str, *, checkout: bool = IS_CHECKOUT) -> str:
    """Return the command that starts a script, for messages.

    Args:
        script: Path of the script in the repository, optionally followed by flags.
        checkout: Whether the code is used from the repository.
    """
    path, *flags = script.split(" ", 1)
    if not checkout:
        return " ".join([PROGRAM, subcommand(path), *flags])
    launcher = "accelerate launch" if is_launched(path) else "python"
    return " ".join([launcher, path, *flags])


def command_with(script: str, flags: Mapping[str, str]) -> str:
    """Return the command that starts a script with these flags, quoted as a shell needs it."""
    return shlex.join(
        [*command(script).split(), *(word for name, value in flags.items() for word in (f"--{name}", value))]
    )


def install_command(extra: str, package: str, *, checkout: bool = IS_CHECKOUT) -> str:
    """Return the command that installs an optional dependency, for messages."""
    return f"pip install -e '.[{extra}]'" if checkout else f"pip install {package}"


def this_command() -> str:
    """Return the command that started this process, so that messages can tell the user to run it again."""
    return " ".join([_program(), *map(shlex.quote, sys.argv[1:])])


def _program() -> str:
    typed = sys.argv[0]
    if typed.startswith(f"{PROGRAM} "):  # set by halftone_trainer
        return typed
    launcher = _launcher()
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    if specification is not None and specification.origin == typed:
        return f"{launcher} -m {specification.name}"
    script = Path(typed).resolve()
    return f"{launcher} {script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else typed}"


def _launcher() -> str:
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    return "python"
